"""The axis of parametrisations: how an adapter changes a kernel. One file each, one line here.

A member is a module with four functions over the last two axes (leading axes are stacks). With W' the changed kernel,
c = ``gain`` (out,), or 1 where that is None, and P what ``delta`` computes, a table of tests asserts its law::

    c * (x @ w + delta(x @ a, adapter, scale)) == x @ merge(w, adapter, scale)

* ``leaves(w, pair, scale)``: what it trains beside the pair, as it starts; ``{}`` where there is nothing;
* ``gain(w, adapter, scale)``: a factor for each column of the kernel, or None;
* ``delta(z, adapter, scale)``: the change of the module's own product, from ``z = x @ lora_a``;
* ``merge(w, adapter, scale)``: the changed kernel.
"""

from stablelora_jax.lora.parametrizations import dora, lora

PARAMETRIZATIONS = {
    "lora": lora,
    "dora": dora,
}
