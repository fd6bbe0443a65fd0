"""What only a real GPU can show, in at most eight minutes: for a machine that is lent for a quarter of an hour.

    python tests/gpu/one_h200.py found.json             # on a GPU
    python tests/gpu/one_h200.py found.json --simulate  # here: the parts that the simulated device can run

Each part prints a line as it ends and is written at once into one JSON: a machine that is taken away leaves what was found. A
part that fails is a line with its error, and the next one runs. Parts whose share of the time is over are not begun.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests/simulated")]

import torch  # noqa: E402

from steerlab import models  # noqa: E402
from steerlab.data.worlds import tiny, tiny_checkpoint  # noqa: E402
from steerlab.inputs.encoded_rows import encode_data  # noqa: E402
from steerlab.inputs.encoding import Encoder  # noqa: E402
from steerlab.inputs.tokens import Batch, Encoded, collate  # noqa: E402
from steerlab.job import TrainConfig  # noqa: E402
from steerlab.methods import METHODS, trained  # noqa: E402
from steerlab.methods.contract import Inputs, Trained, language_modelling_loss, trained_parameters  # noqa: E402
from steerlab.models import load_model, load_tokenizer  # noqa: E402
from steerlab.patches import EmbeddingPatch  # noqa: E402
from steerlab.steered.language import SteeredModel  # noqa: E402
from steerlab.training import numerics  # noqa: E402
from steerlab.training.optimizer import make_optimizer  # noqa: E402

LIMIT_S = 480
"""Seconds of the whole script."""
STARTED_S = time.monotonic()


@dataclass
class Findings:
    """What was found so far, written anew after every part."""

    path: Path
    device: torch.device
    parts: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[torch.device], Any], limit_s: float) -> None:
        """Run one part, unless it could not end in time."""
        left_s, start_s = LIMIT_S - (time.monotonic() - STARTED_S), time.monotonic()
        if limit_s > left_s:
            self.keep(name, {"skipped": f"{left_s:.0f} s are left, it may take {limit_s:.0f}"})
            return
        try:
            found: Any = {"found": work(self.device)}
        except Exception as error:  # whatever it is, the next part runs
            found = {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
        self.keep(name, {**found, "seconds": round(time.monotonic() - start_s, 2)})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Print and write what a part found."""
        self.parts[name] = found
        shown = json.dumps({key: value for key, value in found.items() if key != "trace"})
        print(f"[{time.monotonic() - STARTED_S:6.1f} s] {name}: {shown[:1000]}", flush=True)
        self.path.write_text(json.dumps(self.parts, indent=1))


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object], repeats: int = 3) -> float:
    """Return the median seconds of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start_s = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start_s)
    return sorted(times[1:])[repeats // 2]


@contextmanager
def peak(device: torch.device) -> Iterator[dict[str, int]]:
    """Measure the most bytes that were allocated in a block; empty on a device without such a count."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)


def is_there(device: torch.device) -> dict[str, Any]:
    """Say which torch and which device this is, and multiply once."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": str(device)}
    x = torch.randn(256, 256, device=device)
    found["product"] = float((x @ x).square().mean().sqrt())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "nccl": torch.distributed.is_nccl_available(),
        }
    return found


def marked_tests(device: torch.device) -> dict[str, Any]:
    """Run `pytest -m gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-x", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    return {"code": done.returncode, "last lines": done.stdout.strip().splitlines()[-6:]}


@contextmanager
def tiny_world() -> Iterator[tuple[Path, Encoder]]:
    """Yield a folder with the tiny model and its encoder."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoint.write_model(Path(folder))
        yield Path(folder), Encoder(load_tokenizer(Path(folder)), prompt_style="plain")


def batch_of(encoder: Encoder, trains_on: str, num_rows: int = 8) -> Batch:
    """Return rows of the sort that a method trains on."""
    pairs = trains_on == "preference"
    texts, data_format = ("preferences", "preference") if pairs else ("instructions", "instruction")
    rows = encode_data(encoder, tiny.rows(f"{texts}/train", num_rows), data_format, 64).rows
    return collate(rows, encoder.pad_id, loss_on="response" if pairs else "all")


def steps_of_methods(device: torch.device) -> dict[str, Any]:
    """Train each method that needs no stage before its training for three steps, in both types of weights."""
    found: dict[str, Any] = {}
    names = [name for name, method in METHODS.items() if isinstance(method, Trained) and "causal_lm" in method.kinds]
    with tiny_world() as (folder, encoder):
        for name in names:
            method = trained({"name": name})
            config = method.Config()
            skeleton = models.skeleton(folder)
            if method.reads(config) or method.prepares(config, skeleton, _Nothing()):
                continue
            for dtype in ("float32", "bfloat16"):
                torch.manual_seed(0)
                model: Any = load_model(folder, dtype=dtype, seed=0).to(device).train()  # type: ignore[arg-type]
                module = method.module(model, config, Inputs()).to(device).train()
                optimizer = make_optimizer(module, TrainConfig(steps=3, lr=1e-3))
                batch, losses = batch_of(encoder, method.module.trains_on).to(device), []
                for step in range(3):
                    module.on_step(step, 1.0)
                    optimizer.zero_grad()
                    loss = module(batch).total
                    loss.backward()
                    optimizer.step()
                    losses.append(round(float(loss.detach()), 4))
                found[f"{name} {dtype}"] = losses
    return found


class _Nothing:
    """Takes no preparation: a method that declares one is left out."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_args, **_kwargs: False


def texts_as_on_the_cpu(device: torch.device) -> dict[str, Any]:
    """Generate with a patch on the CPU and on the device."""
    texts = []
    with tiny_world() as (folder, encoder):
        prompts = [encoder.conversation(row["instruction"], row["input"]) for row in tiny.rows("instructions/test", 8)]
        for place in ("cpu", device):
            model: Any = load_model(folder, seed=0).to(place)  # type: ignore[arg-type]
            steered = SteeredModel(model, encoder, (EmbeddingPatch(model.config.hidden_size, 1.0),))
            texts.append([one.text for one in steered.generate(prompts, max_new_tokens=8)[0]])
    return {"equal": sum(a == b for a, b in zip(*texts, strict=True)), "of": len(texts[0])}


def bits(device: torch.device) -> dict[str, Any]:
    """Train twice with and without `train.deterministic`, and compare the bits of the weights."""
    found = {}
    with tiny_world() as (folder, encoder):
        batch = batch_of(encoder, "preference", 32)
        for deterministic in (False, True):
            weights = []
            for _ in range(2):
                with numerics.of(TrainConfig(steps=5, deterministic=deterministic)):
                    torch.manual_seed(0)
                    model: Any = load_model(folder, seed=0).to(device).train()  # type: ignore[arg-type]
                    module = trained({"name": "dpo"}).module(model, trained({"name": "dpo"}).Config(), Inputs()).to(device)
                    optimizer = make_optimizer(module, TrainConfig(steps=5, lr=1e-3))
                    for _ in range(5):
                        optimizer.zero_grad()
                        module(batch.to(device)).total.backward()
                        optimizer.step()
                weights.append([value.detach().cpu() for value in trained_parameters(module).values()])
            same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
            found["deterministic" if deterministic else "as it is"] = "same bits" if same else "other bits"
    return found


def large_model(device: torch.device, small: bool) -> Any:
    """Return a random model of 1.1 B parameters in bfloat16, or a small one where there is no GPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = (256, 688, 4, 4, 1000) if small else (2048, 5632, 22, 32, 32000)
    width, inner, layers, heads, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary,
        num_key_value_heads=heads, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made.to(device)


def large_batch(model: Any, num_rows: int, num_tokens: int) -> Batch:
    """Return rows of random tokens that are all targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (num_rows, num_tokens), generator=generator).tolist()
    rows = [Encoded(row, [2] * num_tokens, [True] * num_tokens, [0] * num_tokens) for row in ids]
    return collate(rows, 0)


def large_training(device: torch.device, small: bool) -> dict[str, Any]:
    """Time a training step of the large model, with the optimizer fused and not, and its use of the device."""
    model = large_model(device, small).train()
    num, (rows, tokens) = sum(p.numel() for p in model.parameters()), (2, 64) if small else (8, 1024)
    batch = large_batch(model, rows, tokens)
    found: dict[str, Any] = {"parameters": num}
    for fused in (None, True) if device.type == "cuda" else (None,):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused, foreach=False if fused is None else None)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            here = batch.to(device)
            language_modelling_loss(model(**here.model_inputs, use_cache=False).logits, here.labels).backward()
            optimizer.step()

        with peak(device) as most:
            step_s = seconds(device, step)
        # Six operations a parameter and token, forward and backward; 989e12 a second is an H200's peak in bfloat16.
        used = 6 * num * rows * tokens / step_s / 989e12
        # Weights and gradients of two bytes, two moments of two bytes.
        found["fused" if fused else "not fused"] = {"step_s": step_s, "utilisation": used, "least_bytes": 8 * num, **most}
        del optimizer
    return found


def large_generation(device: torch.device, small: bool) -> dict[str, Any]:
    """Time generation by the number of tokens in a batch."""
    found: dict[str, Any] = {}
    model = large_model(device, small).eval()
    prompt, new = (16, 4) if small else (200, 32)
    for tokens in (64, 128) if small else (4_096, 32_768, 131_072):
        rows = max(1, tokens // (prompt + new))
        batch = large_batch(model, rows, prompt).to(device)

        def write(batch: Batch = batch) -> None:
            with torch.inference_mode():
                model.generate(
                    batch.input_ids,
                    attention_mask=batch.attention_mask,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                )

        with peak(device) as most:
            took_s = seconds(device, write, 1)
        found[f"{tokens} tokens a batch"] = {"rows": rows, "tokens_per_s": rows * new / took_s, **most}
    return found


def bases(device: torch.device, small: bool) -> dict[str, Any]:
    """Time an eigenbasis and a rotation, with the basis kept on the device and sent for each use."""
    size = 256 if small else 4096
    x = torch.randn(size, size, dtype=torch.float64)
    matrix = x @ x.T
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    like = torch.randn(size, size, device=device)
    kept = models.Kept(basis)
    return {
        "size": size,
        "eigh_on_the_cpu_s": seconds(torch.device("cpu"), lambda: torch.linalg.eigh(matrix), 1),
        "eigh_on_the_device_s": seconds(device, lambda: torch.linalg.eigh(matrix.to(device)), 1),
        "rotation_with_a_kept_basis_s": seconds(device, lambda: like @ kept.like(like)),
        "rotation_with_a_sent_basis_s": seconds(device, lambda: like @ basis.to(device)),
    }


def what_cannot_fit(device: torch.device) -> str:
    """Ask for more memory than there is, and return the message that a user gets."""
    if device.type != "cuda":
        return "not on a simulated device"
    try:
        with models.memory_explained("lower train.micro_batch"):
            torch.empty(1 << 42, dtype=torch.uint8, device=device)
    except ValueError as error:
        left = torch.cuda.memory_allocated(device)
        return f"{error}; {left} bytes are allocated after it"
    return "4 TB were allocated"


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--simulate", action="store_true", help="run what the simulated device of the tests can run")
    asked = parser.parse_args()
    if asked.simulate:
        import simulated_device

        with simulated_device.present() as device:
            parts(Findings(asked.output, device), small=True)
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} can use no GPU here; --simulate runs what the simulated device can run")
    parts(Findings(asked.output, torch.device("cuda", 0)), small=False)


def parts(findings: Findings, small: bool) -> None:
    """Run the parts in the order of what is needed most; each with the seconds that it may take."""
    findings.run("is torch's CUDA there", is_there, 10)
    if not small:
        findings.run("pytest -m gpu", marked_tests, 90)
    findings.run("three steps of each method", steps_of_methods, 60)
    findings.run("texts as on the CPU", texts_as_on_the_cpu, 20)
    findings.run("bits of two runs", bits, 30)
    findings.run("training of a large model", lambda device: large_training(device, small), 60)
    findings.run("generation of a large model", lambda device: large_generation(device, small), 60)
    findings.run("bases", lambda device: bases(device, small), 40)
    findings.run("what cannot fit", what_cannot_fit, 10)


if __name__ == "__main__":
    main()
