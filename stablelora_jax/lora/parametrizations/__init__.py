"""The axis of parametrisations: how an adapter changes a kernel. One file each, one line here.

A member says what it trains, and how a *plain pair* ``lora_a`` (in, k), ``lora_b`` (k, out) is computed from it. Plain
pairs are applied, merged and exported everywhere in the same way. A member whose change has no low rank gives the
change itself instead, and is called *dense*. Of one kernel (in, out):

* ``PAIR``: what the initialisation makes, ``lora_a`` and ``lora_b``, is ``"trained"``, ``"frozen"``, or not used at all
  (``"none"``);
* ``READS_KERNEL``: whether ``start`` reads the values of the kernel, not its shape alone;
* ``start(keys, w, begun, scale)``: the leaves of its adapter from those that the initialisation has begun. Names that
  begin with ``lora_`` are trained, with ``frozen_`` they are not;
* ``pair(adapter, size)``: the plain pair of an adapter of the kernel ``size`` (in, out), differentiable, with
  ``lora_magnitude_vector`` where it is DoRA's; None of a dense member, which has ``change(adapter, w)`` (in, out)
  in its place: the kernel is then ``w + s change``, formed where the module runs;
* ``OPTIONS``, where it takes arguments: their defaults by name. They are passed by name to all of these functions;
* ``READS_AXES``, where the matrix (in, out) does not say enough: ``start`` also gets ``axes``, the sizes of the axes
  that the kernel contracts, (h, w, in) of a convolution;
* ``across(adapter, used)``, where layers of a stack use each other's: the leaves (layers, ...), of which ``used``
  (layers, ...) says where there is an adapter, as ``pair`` takes them of each layer;
* ``share(key, adapters, places, dtype)``, where modules share parameters: the tree of adapters that ``start`` has
  begun, with ``lora_shared`` at its root. ``pair`` finds its leaves beside the module's own: those that lie in
  ``lora_shared`` itself, and those under the module's ``kind``, its path without the numbers of layers. What depends on
  all modules together, such as the number of a layer, ``share`` writes into leaves ``frozen_...`` for which ``start``
  left room.

Where frozen parts are drawn again from ``frozen_seed`` and the like (:data:`.leaves.REDRAWN`), an adapter may carry the
parts themselves, as other programs' files do.

Of plain pairs, over the last two axes (leading axes are stacks), a table of tests asserts the law, with c = ``gain``
(out,), or 1 where that is None, and P what ``delta`` computes::

    c * (x @ w + delta(x @ a, adapter, scale)) == x @ merge(w, adapter, scale)

* ``gain(w, adapter, scale)``: a factor for each column of the kernel, or None;
* ``delta(z, adapter, scale)``: the change of the module's own product, from ``z = x @ lora_a``;
* ``merge(w, adapter, scale)``: the changed kernel.
"""

from stablelora_jax.lora.parametrizations import (
    adalora,
    bat,
    cp,
    cp_dora,
    dora,
    dora_c,
    dota,
    edora,
    inttune,
    loldu,
    lora,
    lora_c,
    lora_xs,
    lorta,
    miss,
    miss_mini,
    paca,
    randlora,
    reslora,
    salt,
    sbora_fa,
    sbora_fb,
    shira,
    slora,
    tied_lora,
    unilora,
    vblora,
    vera,
)

PARAMETRIZATIONS = {
    "lora": lora,
    "dora": dora,
    "adalora": adalora,
    "bat": bat,
    "cp": cp,
    "cp_dora": cp_dora,
    "dora_c": dora_c,
    "dota": dota,
    "edora": edora,
    "inttune": inttune,
    "loldu": loldu,
    "lora_c": lora_c,
    "lora_xs": lora_xs,
    "lorta": lorta,
    "miss": miss,
    "miss_mini": miss_mini,
    "paca": paca,
    "randlora": randlora,
    "reslora": reslora,
    "salt": salt,
    "sbora_fa": sbora_fa,
    "sbora_fb": sbora_fb,
    "shira": shira,
    "slora": slora,
    "tied_lora": tied_lora,
    "unilora": unilora,
    "vblora": vblora,
    "vera": vera,
}
