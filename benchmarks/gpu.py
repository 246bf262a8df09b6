"""One GPU: is it right, how fast is it against the authors' design, and what is each lever worth.

    python benchmarks/gpu.py                                    everything: Llama-3.2-1B's shape, random weights
    python benchmarks/gpu.py --part correctness                 alone, real-size, speed or ablations: each within eight
                                                                minutes on an H100
    python benchmarks/gpu.py --device cpu --small               the same code on a tiny model without a GPU

Float32 master weights and bfloat16 compute (float32 on a CPU), 128 pairs a step with UltraFeedback's lengths. The
speed and the ablations of a CPU say nothing of a GPU's: they show that the code runs.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import contest
import ours
import results
import workload

import data
import model as transformer
import train as trainer
from kernels import attention as attention_kernels
from kernels import log_probs as log_prob_kernels
from runtime import flops

TINY = HERE.parent / "examples" / "tiny"
# How far from log 2 the first loss may be: compiled, the graphs with and without gradients round differently.
START = {"cuda": 1e-2, "cpu": 1e-6}
TWO_LAYERS = workload.LLAMA_256 | {"num_hidden_layers": 2, "vocab_size": 1031}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and four pairs a step")
    parser.add_argument("--batch", type=int, default=128, help="pairs a step")
    parser.add_argument("--out", default=results.PATH, help="the Markdown file whose sections are written")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --small runs the same code without one")
    if options.small:
        options.batch = 4
    options.config = workload.LLAMA_TINY if options.small else workload.LLAMA_3_2_1B
    with tempfile.TemporaryDirectory() as directory:
        for part in options.part:
            title = f"## {options.device.upper()}: {part}\n\n`python benchmarks/gpu.py --part {part}"
            title += f"{' --device cpu' * (options.device == 'cpu')}{' --small' * options.small}` on "
            results.write(
                f"{options.device} {part}",
                f"{title}{results.machine(options.device)}.\n\n" + PARTS[part](options, Path(directory)),
                options.out,
            )


# ------------------------------------------------------------------------------------------------- correctness


def correctness(options, directory):
    """A row a check: what was found, what it may be at most, and whether it holds."""
    checks = {
        "packed attention against a dense softmax, values and gradients": apart(check_attention, options.device),
        "log-prob function against the plain one, values and gradients": apart(check_log_probs, options.device),
    }
    small = workload.write_model(directory / "two layers", TWO_LAYERS, 0)
    checks |= apart(check_model, options.device, small)
    return as_table(checks | check_run(options.device, directory, TINY / "model", ["--save-every", "2"]))


def as_table(checks):
    """checks: name -> (what was found, what it may be at most)."""
    rows = [
        [name, f"{found:.1e}", f"{limit:.0e}", "yes" if found <= limit else "**NO**"]
        for name, (found, limit) in checks.items()
    ]
    return results.table(["check", "largest difference", "at most", "holds"], rows)


def real_size(options, directory):
    """train.py on a random model of the benchmark's shape: it trains, stops, resumes and exports."""
    start = workload.write_model(directory / "start", options.config, 0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / name, start / name)
    return as_table(check_run(options.device, directory, start, ["--lr", "1e-6", "--save-every", "0", "--keep", "1"]))


def compute_type(device):
    """-> the compute type and how far it may be off."""
    return (torch.bfloat16, 1e-2) if device == "cuda" else (torch.float32, 1e-4)


def off(found, expected):
    """The norm of the difference over the norm of what is expected; inf where it is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def check_attention(device):
    """model.packed_attention against each segment's softmax written out, in float32 from the same inputs."""
    dtype, limit = compute_type(device)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for shapes in ([(5, 7, 3), (1, 1, 1)], [(1, 30, 2), (64, 128, 200), (300, 20, 100)]):
        pairs = [data.Pair(*(torch.ones(n, dtype=torch.int32).numpy() for n in shape), "") for shape in shapes]
        for share, window in ((True, None), (True, 17), (False, None)):
            pack = data.collate(pairs, share_prompt=share)
            pack = pack.to(torch.device(device))
            inputs = [
                torch.randn(len(pack.tokens), heads, 64, generator=generator).to(device, dtype).requires_grad_()
                for heads in (8, 2, 2)
            ]
            wide = [x.detach().float().requires_grad_() for x in inputs]
            found, expected = transformer.packed_attention(*inputs, pack, window), dense(*wide, pack, window)
            weights = torch.randn(expected.shape, generator=generator).to(device)
            worst = max(
                worst,
                off(found, expected),
                *map(
                    off,
                    torch.autograd.grad(found, inputs, weights.to(dtype)),
                    torch.autograd.grad(expected, wide, weights),
                ),
            )
    return worst, limit


def dense(q, k, v, pack, window):
    """Attention of a packed row, a softmax a segment: q [N, H, D], k and v [N, K, D] -> [N, H, D]."""
    out, cu_q, cu_k = [], pack.cu_q.tolist(), pack.cu_k.tolist()
    for s in range(len(cu_q) - 1):
        rows = pack.keys[cu_k[s] : cu_k[s + 1]]
        queries = q[cu_q[s] : cu_q[s + 1]]
        keys, values = (x[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", queries, keys) / q.shape[2] ** 0.5
        positions = torch.arange(len(rows) - len(queries), len(rows), device=q.device)
        mask = attention_kernels.causal_mask(positions[None], len(rows), window)[0]
        out.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(~mask, -math.inf).softmax(-1), values))
    return torch.cat(out)


def full_log_probs(hidden, weight, targets, *_):
    """log softmax(hidden · weightᵀ)[target], the obvious way: all logits [R, V] at once."""
    logits = hidden @ weight.t()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def check_log_probs(device):
    """The chunked log-prob function, eager and compiled, against full_log_probs in float64."""
    dtype, limit = compute_type(device)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    hidden, weight = torch.randn(300, 128, generator=generator), torch.randn(1031, 128, generator=generator)
    targets = torch.randint(0, 1031, (300,), generator=generator).to(device)
    grad = torch.randn(300, generator=generator).to(device)
    inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = full_log_probs(*wide, targets)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    for rows in (64, 1000):
        for compiled in (False, True):
            found = log_prob_kernels._TokenLogProbs.apply(*inputs, targets, rows, compiled)
            grads = torch.autograd.grad(found, inputs, grad)
            worst = max(worst, off(found, expected), *map(off, grads, expected_grads))
    return worst, limit


def check_model(device, directory):
    """The sharded, compiled and recomputing policy against the same weights in float32 with full logits."""
    dtype, limit = compute_type(device)
    pairs = workload.make_pairs(6, TWO_LAYERS["vocab_size"], 8)
    plain = transformer.load_model(str(directory), device=device)
    pack = data.collate(pairs).to(torch.device(device))
    expected = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            row = torch.tensor([*pair.prompt, *response], device=device)
            logp = plain(row[None])[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
            expected.append(logp.gather(1, row[len(pair.prompt) :, None])[:, 0])
    expected = torch.cat(expected)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(expected), generator=generator).to(device)
    expected.backward(weights)
    checks = {}
    for name, settings in {
        "as it is": {"compile": False, "activation_checkpointing": "none"},
        "recomputed": {"compile": False, "activation_checkpointing": "full"},
        "compiled": {"compile": True, "activation_checkpointing": "none"},
    }.items():
        with ours.a_run(directory, pairs, device, **settings) as run:
            net, _ = ours.policy(run, directory)
            if not checks:
                exact = max(
                    off(a if not hasattr(a, "full_tensor") else a.full_tensor(), b)
                    for a, b in zip(net.parameters(), plain.parameters())
                )
                checks["weights read by the sharded model against load_model's"] = exact, 0.0
            found = net(pack.tokens, pack)
            found.backward(weights)
            grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
            worst = max(off(found, expected), *(off(a, p.grad) for a, p in zip(grads, plain.parameters())))
            checks[f"sharded model, {name}, against full logits in float32, values and gradients"] = worst, 5 * limit
    losses = []
    ours.train(str(directory), str(directory), pairs, 6, losses.append, device=device)
    checks["the first step's loss against log 2"] = abs(losses[1] - math.log(2)), START[device]
    return checks


def check_run(device, directory, start, settings):
    """train.py from `start` on pairs of the bundled example: whole, and stopped by SIGTERM and resumed; its first loss;
    the policy in transformers."""
    directory = Path(tempfile.mkdtemp(dir=directory))
    rows = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()[:48]
    (directory / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = [
        sys.executable,
        str(HERE.parent / "train.py"),
        "--model",
        str(start),
        "--data",
        str(directory / "rows.jsonl"),
        "--max-length",
        "256",
        "--batch-size",
        "8",
        "--lr",
        "3e-4",
        "--beta",
        "0.3",
        "--samples",
        "1",
        "--sample-tokens",
        "4",
        "--report-pairs",
        "4",
        *settings,
        "--out",
    ]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})

    def begin(out, *more):
        return subprocess.Popen([*words, str(out), *more], env=environment, stdout=subprocess.DEVNULL)

    def losses(out):
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return {(row["stage"], row["step"]): row["loss"] for row in metrics}

    whole, stopped = directory / "whole", directory / "stopped"
    checks = {"train.py's exit status": (begin(whole).wait(), 0)}
    shutil.rmtree(whole / "checkpoints", ignore_errors=True)  # a machine with 64 GB of disk is enough
    process, metrics = begin(stopped), stopped / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    checks["its exit status after SIGTERM, from 143"] = abs(process.wait() - 143), 0
    checks["its exit status when resumed"] = begin(stopped, "--resume").wait(), 0
    a, b = losses(whole), losses(stopped)
    apart_by = max(abs(a[key] - b[key]) for key in a) if a.keys() == b.keys() else math.inf
    checks["the first loss of each stage against log 2"] = (
        max(abs(a.get((stage, 1), math.inf) - math.log(2)) for stage in ("dpo", "tgdpo")),
        START[device],
    )
    checks["losses, stopped and resumed against never stopped"] = apart_by, 1e-3 if device == "cuda" else 0.0
    with contextlib.suppress(ImportError):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(whole / "policy", dtype=torch.float32)
        tokens = torch.arange(4, 60)[None]
        found = transformer.load_model(str(whole / "policy"))(tokens)
        checks["the exported policy's logits in transformers"] = off(found, theirs(tokens).logits), 1e-4
    return checks


# ------------------------------------------------------------------------------------------------------- speed


SPEEDS = ["", "pairs/s", "tokens/s", "seconds a step", "MFU", "peak, GB"]


def start_of(options, directory):
    """The random policy's directory, written once, and three steps' pairs."""
    if not (policy := directory / "policy").exists():
        workload.write_model(policy, options.config, 0)
    return policy, workload.make_pairs(options.batch * 3, options.config["vocab_size"], 16 if options.small else 1)


def alone(options, directory):
    """Our speed and MFU, and the log-prob function against its bare products."""
    policy, pairs = start_of(options, directory)
    mine = apart(measure, options.device, policy, pairs, options.batch)
    text = [results.table(SPEEDS, [row("ours", mine, pairs, options)]), ""]
    text += [f"A forward pass over a step's pairs takes {mine['forward']:.3f} s. {mine['plan']}", ""]
    rows = [
        [f"{chunk} rows, {'compiled' if compiled else 'eager'}", f"{found:.2f}", f"{bare:.2f}", f"{found / bare:.2f}"]
        for chunk, compiled, found, bare in apart(measure_log_probs, options)
    ]
    text += [results.table(["log-prob function, forward and backward", "ms", "its bare products, ms", "ratio"], rows)]
    return "\n".join(text)


def speed(options, directory):
    """Warm and cold speed against the authors' design."""
    policy, pairs = start_of(options, directory)
    mine = apart(measure, options.device, policy, pairs, options.batch)
    rows = [row("ours", mine, pairs, options)]
    print(*rows[-1], flush=True)
    theirs = {}
    for name, settings in {
        "a pair at a time, checkpointing": {"per_device": 1, "checkpointing": True},
        "a pair at a time": {"per_device": 1, "checkpointing": False},
        "padded in fours, checkpointing": {"per_device": 4, "checkpointing": True},
    }.items():
        name = f"authors' design, {name}"
        try:
            each = contest.Contender("authors", policy, policy, pairs, options.batch, options.device, **settings)
            contest.take_turns([each], 3)
        except RuntimeError as error:
            rows.append([name, " ".join(str(error).split())[-60:], "", "", "", ""])
            print(*rows[-1], flush=True)
            continue
        theirs[name] = {"seconds": statistics.median(each.seconds[1:]), "peak": each.peak, "mfu": None}
        rows.append(row(name, theirs[name], pairs, options))
        print(*rows[-1], flush=True)
    text = [results.table(SPEEDS, rows), ""]
    if theirs:
        best = min(theirs.values(), key=lambda found: found["seconds"])
        epoch = mine["seconds"] + 2 * mine["forward"]
        text += [
            f"Warm: {best['seconds'] / mine['seconds']:.2f} times the pairs/s of the authors' fastest setting. "
            f"Cold, one epoch with the passes of reference and guide: {best['seconds'] / epoch:.2f}. "
        ]
    return "\n".join([*text, mine["plan"]])


def row(name, found, pairs, options):
    """A line of the table of speeds, of steps over `pairs` of which the first warmed up."""
    tokens = workload.workload_tokens(pairs[options.batch :]) / (len(pairs) / options.batch - 1)
    mfu = f"{found['mfu']:.1%}" if found["mfu"] else "-"
    return [
        name,
        f"{options.batch / found['seconds']:.1f}",
        f"{tokens / found['seconds']:.0f}",
        f"{found['seconds']:.3f}",
        mfu,
        f"{found['peak'] / 1e9:.1f}",
    ]


def measure(device, directory, pairs, batch):
    """Steps of `batch` pairs, the first to warm up, and forward passes over as many -> seconds, MFU, peak, plan."""
    with ours.a_run(directory, pairs, device) as run:
        net = trainer.sharded(directory, run, frozen=True)
        seconds, logps = [], []
        for start in range(0, len(pairs), batch):
            logps += timed(seconds, device, trainer.log_probs, run, net, pairs[start : start + batch], "frozen")
        forward = statistics.median(seconds[1:])
        del net
        trainer.release(run)
        net, optimiser = ours.policy(run, directory)
        found = steps(run, net, optimiser, trainer.Stage("tgdpo", pairs, [], logps, logps), batch)
        plan = (
            f"Micro-batches of {run.plan.micro_tokens} tokens, activation checkpointing {run.plan.recompute}, "
            f"compile {'on' if run.plan.compile else 'off'}."
        )
        return found | {"forward": forward, "plan": plan}


def steps(run, net, optimiser, stage, batch):
    """Trains on the stage's pairs, `batch` a step -> the median step's seconds, its MFU, the peak of memory."""
    device, seconds = run.device.type, []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for start in range(0, len(stage.pairs), batch):
        timed(seconds, device, trainer.optimiser_step, run, net, optimiser, stage, range(start, start + batch))
    shapes = workload.lengths(stage.pairs[batch:])
    done = sum(flops.pair_flops(net.config, *map(int, shape)) for shape in shapes)
    peak = flops.peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    held = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak": held,
        "mfu": done / sum(seconds[1:]) / peak if peak else None,
    }


def timed(seconds, device, function, *arguments):
    """Calls the function and appends what it took -> its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = function(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
    return found


def measure_log_probs(options):
    """[(rows a chunk, compiled, milliseconds, milliseconds of the products alone)]; medians of forward and backward."""
    width, vocab = options.config["hidden_size"], options.config["vocab_size"]
    dtype, _ = compute_type(options.device)
    R, found = 64 if options.small else 12288, []
    hidden, weight = (torch.randn(n, width, device=options.device).to(dtype).requires_grad_() for n in (R, vocab))
    targets, grad = torch.randint(0, vocab, (R,), device=options.device), torch.randn(R, device=options.device)

    def bare(slices):
        with torch.no_grad():
            for place, rows in enumerate(slices):
                logits = hidden[rows] @ weight.t()
                logits @ weight
                logits.t() @ hidden[rows]
                if place < len(slices) - 1:  # the last chunk's logits are kept
                    hidden[rows] @ weight.t()

    def function(chunk, compiled):
        hidden.grad = weight.grad = None
        log_prob_kernels._TokenLogProbs.apply(hidden, weight, targets, chunk, compiled).backward(grad)

    for chunk in (16, 64) if options.small else (256, 1024, 2048, 4096):
        for compiled in (False, True):
            times = {"bare": [], "function": []}
            for _ in range(6):
                timed(times["bare"], options.device, bare, attention_kernels.equal_slices(R, chunk))
                timed(times["function"], options.device, function, chunk, compiled)
            function_ms, bare_ms = (1000 * statistics.median(times[name][1:]) for name in ("function", "bare"))
            found.append((chunk, compiled, function_ms, bare_ms))
    return found


# --------------------------------------------------------------------------------------------------- ablations


def ablations(options, directory):
    """What a step costs without each lever, or with it set otherwise; the gain that was predicted beside it."""
    policy, pairs = start_of(options, directory)
    found = apart(ablate, options, policy, pairs, True) | apart(ablate, options, policy, pairs, False)
    base = found["as it is"]
    rows = []
    for name, (result, predicted) in found.items():
        if isinstance(result, str):
            rows.append([name, result, "", "", predicted])
            continue
        cost = result["seconds"] / base[0]["seconds"]
        rows.append(
            [name, f"{options.batch / result['seconds']:.1f}", f"{cost:.2f}", f"{result['peak'] / 1e9:.1f}", predicted]
        )
    return results.table(["", "pairs/s", "seconds against as it is", "peak, GB", "predicted"], rows)


def ablate(options, directory, pairs, compiled):
    """name -> (what `steps` found or the words of a failure, the prediction)."""
    found, batch = {}, options.batch
    sizes = (64, 256) if options.small else (2048, 4096, 8192, 16384, 32768)
    chunks = (16, 64) if options.small else (256, 1024, 2048, 4096, 8192)
    with ours.a_run(directory, pairs, options.device, compile=compiled) as run:
        net, optimiser = ours.policy(run, directory)
        zeros = [torch.zeros(pair.scored) for pair in pairs]
        stage = trainer.Stage("tgdpo", pairs, [], zeros, zeros)

        def attempt(name, predicted, plan=run.plan, **patched):
            """A variant: another plan, or other functions put in the place of module.name."""
            for number, layer in enumerate(net.model.layers):
                layer.recompute = plan.recomputes(number)
            kept = {place: getattr(*place) for place in patched.get("put", {})}
            torch._dynamo.reset()  # what an earlier variant made the compiler take for constant
            try:
                for place, other in patched.get("put", {}).items():
                    setattr(*place, other)
                result = steps(run._replace(plan=plan), net, optimiser, stage, batch)
            except torch.OutOfMemoryError:
                optimiser.zero_grad()
                trainer.release(run)
                result = "out of memory"
            finally:
                for place, mine in kept.items():
                    setattr(*place, mine)
            found[name] = result, predicted
            print(name, result, flush=True)

        if not compiled:
            attempt("no torch.compile", "1.16 to 1.27")
            return found
        attempt("as it is", "1")
        attempt(
            "the prompt stored twice",
            "1.18",
            put={(data, "collate"): functools.partial(data.collate, share_prompt=False)},
        )
        attempt("full logits", "1, more memory", put={(transformer, "token_log_probs"): full_log_probs})
        for rows in chunks:
            attempt(
                f"logits in chunks of {rows} tokens",
                "1; more below 2048" if not options.small else "",
                put={(log_prob_kernels, "chunk_tokens"): lambda *given, rows=rows: rows},
            )
        for tokens in sizes:
            attempt(f"packs of {tokens} tokens", "1; more when small", run.plan._replace(micro_tokens=tokens))
        for recompute, predicted in (("selective", "1.15"), ("full", "1.3")):
            attempt(f"activation checkpointing {recompute}", predicted, run.plan._replace(recompute=recompute))
    return found


def apart(function, *arguments):
    """function(*arguments) in a new process, whose GPU memory goes with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(contest.START)) as pool:
        return pool.submit(function, *arguments).result()


PARTS = {"correctness": correctness, "alone": alone, "real-size": real_size, "speed": speed, "ablations": ablations}

if __name__ == "__main__":
    main()
