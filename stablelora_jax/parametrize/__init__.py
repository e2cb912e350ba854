"""The axis of parametrisations: how a pair changes a kernel. One file each, one line here.

A member is a module with two functions over the last two axes (leading axes are stacks), bound by one law that a table
of tests asserts, ``x @ w + delta(x @ a, adapter, scale) == x @ merge(w, adapter, scale)``:

* ``delta(z, adapter, scale)``: the change of the module's own output, from ``z = x @ lora_a``;
* ``merge(w, adapter, scale)``: the changed kernel.
"""

from stablelora_jax.parametrize import lora

PARAMETRIZATIONS = {
    "lora": lora,
}
