"""stablelora_jax: LoRA for JAX as a functional transform of parameters, with Stable-LoRA at its heart.

See README.md for the quick start; every public name is documented where it is defined. Names are imported on first use
(PEP 562), so that ``import stablelora_jax`` and ``stablelora --help`` do not wait for jax.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors read; the same names are in _MODULES
    from stablelora_jax.data import Batch as Batch
    from stablelora_jax.generation.bank import banked as banked
    from stablelora_jax.generation.bank import make_bank as make_bank
    from stablelora_jax.generation.bank import replace_adapter as replace_adapter
    from stablelora_jax.generation.generate import generate as generate
    from stablelora_jax.interop import load_peft as load_peft
    from stablelora_jax.interop import save_peft as save_peft
    from stablelora_jax.interop.warm_start import start_adapters as start_adapters
    from stablelora_jax.lora.apply import adapted as adapted
    from stablelora_jax.lora.calibration import calibrate as calibrate
    from stablelora_jax.lora.calibration import quantization_residual as quantization_residual
    from stablelora_jax.lora.combine import combine as combine
    from stablelora_jax.lora.leaves import split_frozen as split_frozen
    from stablelora_jax.lora.leaves import with_frozen as with_frozen
    from stablelora_jax.lora.spec import LoraSpec as LoraSpec
    from stablelora_jax.lora.summary import describe as describe
    from stablelora_jax.lora.to_lora import to_lora as to_lora
    from stablelora_jax.lora.transform import init_adapters as init_adapters
    from stablelora_jax.lora.transform import lora_hyperparams as lora_hyperparams
    from stablelora_jax.lora.transform import merge as merge
    from stablelora_jax.lora.transform import unmerge as unmerge
    from stablelora_jax.lora.zero_ranks import without_zero_ranks as without_zero_ranks
    from stablelora_jax.models.pretrained.load import base_directory as base_directory
    from stablelora_jax.models.pretrained.load import load_pretrained as load_pretrained
    from stablelora_jax.models.pretrained.load import save_pretrained as save_pretrained
    from stablelora_jax.models.untie import untie as untie
    from stablelora_jax.optimizers import allora as allora
    from stablelora_jax.optimizers import altlora as altlora
    from stablelora_jax.optimizers import altlora_plus as altlora_plus
    from stablelora_jax.optimizers import balance_after as balance_after
    from stablelora_jax.optimizers import balora as balora
    from stablelora_jax.optimizers import freeze_a as freeze_a
    from stablelora_jax.optimizers import loft as loft
    from stablelora_jax.optimizers import lora_fa as lora_fa
    from stablelora_jax.optimizers import lora_muon as lora_muon
    from stablelora_jax.optimizers import lora_plus as lora_plus
    from stablelora_jax.optimizers import lora_pre as lora_pre
    from stablelora_jax.optimizers import lora_pro as lora_pro
    from stablelora_jax.optimizers import lora_rite as lora_rite
    from stablelora_jax.optimizers import oplora as oplora
    from stablelora_jax.optimizers import rate_factor as rate_factor
    from stablelora_jax.optimizers import riemannian as riemannian
    from stablelora_jax.optimizers import scaled_adamw as scaled_adamw
    from stablelora_jax.optimizers import scaled_gd as scaled_gd
    from stablelora_jax.optimizers import scales as scales
    from stablelora_jax.optimizers import shrink_until_stable as shrink_until_stable
    from stablelora_jax.optimizers import stable_lora as stable_lora
    from stablelora_jax.optimizers import stiefel_lora as stiefel_lora
    from stablelora_jax.optimizers import still_shrinking as still_shrinking
    from stablelora_jax.optimizers.freeze import freeze as freeze
    from stablelora_jax.optimizers.freeze import freeze_mask as freeze_mask
    from stablelora_jax.optimizers.freeze import stop_frozen_gradients as stop_frozen_gradients
    from stablelora_jax.rank_allocation.adalora import mask_to_budget as mask_to_budget
    from stablelora_jax.rank_allocation.adalora import orthogonality as orthogonality
    from stablelora_jax.rank_allocation.cola import tie_knot as tie_knot
    from stablelora_jax.rank_allocation.cola import with_slots as with_slots
    from stablelora_jax.rank_allocation.dylora import drawn_rank as drawn_rank
    from stablelora_jax.rank_allocation.dylora import first_ranks as first_ranks
    from stablelora_jax.rank_allocation.gora import gora_spec as gora_spec
    from stablelora_jax.rank_allocation.matryoshka import aurac as aurac
    from stablelora_jax.rank_allocation.matryoshka import nested_sum as nested_sum
    from stablelora_jax.rank_allocation.nested import truncate as truncate
    from stablelora_jax.rank_allocation.restart import restart as restart
    from stablelora_jax.rank_allocation.restart import restartable as restartable
    from stablelora_jax.rank_allocation.squeeze import squeezed as squeezed
    from stablelora_jax.training import checkpoint as checkpoint
    from stablelora_jax.training.loss import summed_loss as summed_loss
    from stablelora_jax.utils.errors import InputError as InputError
    from stablelora_jax.utils.errors import RunError as RunError
    from stablelora_jax.utils.fingerprint import fingerprint as fingerprint

    __version__: str

_MODULES = {
    "data": "Batch",
    "generation.bank": "banked make_bank replace_adapter",
    "generation.generate": "generate",
    "interop": "load_peft save_peft",
    "interop.warm_start": "start_adapters",
    "lora.apply": "adapted",
    "lora.calibration": "calibrate quantization_residual",
    "lora.combine": "combine",
    "lora.leaves": "split_frozen with_frozen",
    "lora.spec": "LoraSpec",
    "lora.summary": "describe",
    "lora.to_lora": "to_lora",
    "lora.transform": "init_adapters lora_hyperparams merge unmerge",
    "lora.zero_ranks": "without_zero_ranks",
    "models.pretrained.load": "base_directory load_pretrained save_pretrained",
    "models.untie": "untie",
    "optimizers": "allora altlora altlora_plus balance_after balora freeze_a loft lora_fa lora_muon lora_plus lora_pre "
    "lora_pro lora_rite oplora rate_factor riemannian scaled_adamw scaled_gd scales shrink_until_stable stable_lora "
    "stiefel_lora still_shrinking",
    "optimizers.freeze": "freeze freeze_mask stop_frozen_gradients",
    "rank_allocation.adalora": "mask_to_budget orthogonality",
    "rank_allocation.cola": "tie_knot with_slots",
    "rank_allocation.dylora": "drawn_rank first_ranks",
    "rank_allocation.gora": "gora_spec",
    "rank_allocation.matryoshka": "aurac nested_sum",
    "rank_allocation.nested": "truncate",
    "rank_allocation.restart": "restart restartable",
    "rank_allocation.squeeze": "squeezed",
    "training": "checkpoint",
    "training.loss": "summed_loss",
    "utils.errors": "InputError RunError",
    "utils.fingerprint": "fingerprint",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
_FOLDERS = (
    "cli config data evaluation generation interop jobs lora models objectives optimizers parallel quantization"
    " rank_allocation runs studies training utils"
)
__all__ = sorted(_HOME)

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import a public name, a folder or the version on first use."""
        from importlib import import_module, metadata

        if name in _FOLDERS.split():
            return import_module(f"{__name__}.{name}")
        if name == "__version__":
            try:
                found = metadata.version("stablelora-jax")
            except metadata.PackageNotFoundError:  # a source tree that is not installed
                found = "0+unknown"
        elif name in _HOME:
            found = getattr(__import__(f"{__name__}.{_HOME[name]}", fromlist=[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__():
        """The public names and the folders."""
        return sorted({*globals(), *__all__, *_FOLDERS.split(), "__version__"})
