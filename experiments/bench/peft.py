"""The peer of ``bench.py train --peer peft``: transformers' model, PEFT's LoRA, PyTorch's AdamW.

It uses the same ``config.json``, tokens and loss tokens (labels are -100 elsewhere). Attention is SDPA; on a GPU,
flash-attn for rows of one document where it is installed. Weights are random, in the dtype of the base; adapters are
float32. A bfloat16 base runs under autocast, as with ``Trainer(bf16=True)``. No key-value cache; AdamW is fused.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from bench.side import Side, cores, host_memory, resident, serve
from bench.work import Workload, arrays


def prepare(work: Workload, backend: str | None = None) -> Side:
    """Create the model and warm up, under ``torch.compile`` if a ``backend`` is given."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(cores())
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32, as jax has on a GPU
    torch.manual_seed(0)
    before = resident()
    model = make_model(work, device)
    found = {key: torch.as_tensor(value, dtype=torch.long, device=device) for key, value in arrays(work).items()}
    inputs = {"input_ids": found["tokens"], "labels": found["tokens"].masked_fill(found["loss_mask"] == 0, -100)}
    if work.documents > 1:
        inputs["position_ids"] = found["positions"]  # where they restart at 0, transformers masks other documents
    parts = [dict(zip(inputs, part, strict=True)) for part in zip(*micro_batches(inputs, work), strict=True)]
    forward = torch.compile(model, backend=backend) if backend else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if work.dtype == "bfloat16" else nullcontext
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def run(count: int) -> float:
        for _ in range(count):
            for part in parts:  # all have as many loss tokens: the mean of their means is the mean
                with autocast():
                    loss = forward(**part, use_cache=False).loss
                (loss / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()
        return loss.item()

    times = [clock(run) for _ in range(3)]
    metadata = {"compile_seconds": max(0.0, times[0] - times[-1]), "lora_parameters": sum(p.numel() for p in trained)}
    metadata |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "versions": versions()}
    if device.type == "cpu":
        return Side(run, metadata, host_memory(before))
    peak = torch.cuda.max_memory_allocated
    return Side(run, metadata, lambda: {"peak_memory_bytes": peak()}, torch.cuda.empty_cache)


def make_model(work: Workload, device: Any) -> Any:
    """The model with its adapters, created on ``device`` in its final dtype."""
    import peft
    import torch
    import transformers

    raw = {key: value for key, value in work.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(
        work.config["model_type"], **raw, attn_implementation=attention_implementation(device, work)
    )
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype))
    model.config.use_cache = False
    lora = peft.LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules=work.target, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).train()


def micro_batches(inputs: dict[str, Any], work: Workload) -> list[Any]:
    """Each input, split into micro-batches."""
    return [value.chunk(work.accumulate) for value in inputs.values()]


def attention_implementation(device: Any, work: Workload) -> str:
    """transformers' ``attn_implementation``: its flash attention supports packed rows only at batch size 1."""
    flash = device.type == "cuda" and work.documents == 1 and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if flash else "sdpa"


def clock(run: Any) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    run(1)
    return time.perf_counter() - began


def versions() -> dict[str, str]:
    """The versions of this side's packages."""
    import peft
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    serve(partial(prepare, backend="inductor" if sys.argv[2:] == ["compile"] else None))
