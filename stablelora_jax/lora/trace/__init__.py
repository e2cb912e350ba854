"""LoRA on any JAX function: its computation is traced, frozen leaves are followed to the products that read them.

A model may be a Linen or NNX module or a pure function of a tree of arrays; it makes no difference here, for what is
read is its jaxpr. An interpreter (:mod:`.interpret`) evaluates the jaxpr with some of the parameters as
:class:`~.weight.Weight`: the leaf with its adapter. Casts, reshapes, transposes, slices, scans, remat and nested jits
hand a weight on (:mod:`.structure`, :mod:`.control`); ``dot_general``, ``conv_general_dilated``, ``gather`` and
``ragged_dot`` add the low-rank path to what they compute (:mod:`.products`); any other primitive refuses it by name.
The same interpreter, with weights that have no adapter yet, finds which axes of a leaf are contracted (:mod:`.layout`).

Compared with peers: qwix replaces ``jax.lax.dot_general`` and ``jnp.einsum`` in the process while a model runs, and
needs its modules to hold the pair; lorax and quax carry a low-rank array through a function, too, but merge it with a
warning where they do not know the operation, and do not enter ``scan`` with stacked pairs.
"""
