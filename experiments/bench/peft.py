"""The other side of ``bench.py train --peer peft``: transformers' model, PEFT's LoRA, PyTorch's AdamW.

The same ``config.json``, tokens and learnt tokens (labels -100 elsewhere); SDPA attention, on a GPU flash-attn's for
rows of one text where it is installed; random weights in the dtype of the base, adapters in float32 and, with a
bfloat16 base, autocast as ``Trainer(bf16=True)`` does; no cache of keys and values; AdamW in its fused form.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from bench.side import Side, cores, host_memory, resident, serve
from bench.work import Work, arrays


def prepare(work: Work, backend: str | None = None) -> Side:
    """Take the step a few times, through ``torch.compile`` with a ``backend`` if there is one."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(cores())
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32, as jax has on a GPU
    torch.manual_seed(0)
    before = resident()
    model = made(work, device)
    found = {key: torch.as_tensor(value, dtype=torch.long, device=device) for key, value in arrays(work).items()}
    inputs = {"input_ids": found["tokens"], "labels": found["tokens"].masked_fill(found["loss_mask"] == 0, -100)}
    if work.documents > 1:
        inputs["position_ids"] = found["positions"]  # where they begin again, transformers masks other texts
    parts = [dict(zip(inputs, cut, strict=True)) for cut in zip(*chunks(inputs, work), strict=True)]
    forward = torch.compile(model, backend=backend) if backend else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    half = partial(torch.autocast, device.type, torch.bfloat16) if work.dtype == "bfloat16" else nullcontext
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def run(count: int) -> float:
        for _ in range(count):
            for part in parts:  # as many loss tokens in each: the mean of means is the mean
                with half():
                    loss = forward(**part, use_cache=False).loss
                (loss / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()
        return loss.item()

    times = [clock(run) for _ in range(3)]
    about = {"compile_seconds": max(0.0, times[0] - times[-1]), "lora_parameters": sum(p.numel() for p in trained)}
    about |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "versions": versions()}
    if device.type == "cpu":
        return Side(run, about, host_memory(before))
    return Side(run, about, lambda: {"peak_memory_bytes": torch.cuda.max_memory_allocated()}, torch.cuda.empty_cache)


def made(work: Work, device: Any) -> Any:
    """The model with its adapters, made where and in the dtype in which it stays."""
    import peft
    import torch
    import transformers

    raw = {key: value for key, value in work.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(
        work.config["model_type"], **raw, attn_implementation=attention(device, work)
    )
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype))
    model.config.use_cache = False
    lora = peft.LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules=work.target, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).train()


def chunks(inputs: dict[str, Any], work: Work) -> list[Any]:
    """Each input in micro-batches."""
    return [value.chunk(work.accumulate) for value in inputs.values()]


def attention(device: Any, work: Work) -> str:
    """What transformers is asked for; of packed rows its flash attention keeps texts apart in a batch of one alone."""
    flash = device.type == "cuda" and work.documents == 1 and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if flash else "sdpa"


def clock(run: Any) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    run(1)
    return time.perf_counter() - began


def versions() -> dict[str, str]:
    """Of what this side is made of."""
    import peft
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    serve(partial(prepare, backend="inductor" if sys.argv[2:] == ["compile"] else None))
