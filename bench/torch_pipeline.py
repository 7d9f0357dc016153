"""One of two processes of a GPT in `torch.distributed.pipelining`: what bench/torch_peer.py starts.

It builds the model once for each way of dividing it among the processes, says on stdout that it is
ready, and then runs what it reads a name of on stdin, one line a run, and answers with the seconds.
The blocks are those of `bench/torch_gpt.py`; embedding, final norm and a head of its own are parts
of the first and last stage. A run is the loss and the gradients of all parameters.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional

from torch_gpt import Block

VOCAB_SIZE = 256
SINGLE = {"GPipe": schedules.ScheduleGPipe, "1F1B": schedules.Schedule1F1B}
CHUNKED = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero bubble": schedules.ScheduleInterleavedZeroBubble,
    "zero bubble V": schedules.ScheduleZBVZeroBubble,
}


class Part(nn.Module):
    """Some of the blocks, with the embedding if they are the first, with the head if the last."""

    def __init__(self, args: argparse.Namespace, index: int, num_parts: int) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == num_parts - 1
        if self.is_first:
            self.tokens = nn.Embedding(VOCAB_SIZE, args.d_model)
            self.positions = nn.Embedding(args.seq_len, args.d_model)
        num_blocks = args.num_layers // num_parts
        self.blocks = nn.Sequential(
            *(Block(args.d_model, args.num_heads) for _ in range(num_blocks))
        )
        if self.is_last:
            self.norm = nn.LayerNorm(args.d_model)
            self.head = nn.Linear(args.d_model, VOCAB_SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            x = self.tokens(x) + self.positions.weight
        x = self.blocks(x)
        return self.head(self.norm(x)) if self.is_last else x


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    args = parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.process_id]})
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{args.port}", rank=args.process_id, world_size=2
    )
    torch.manual_seed(0)
    rows = torch.randint(VOCAB_SIZE, (args.batch_size, args.seq_len + 1))
    programs = make_programs(args, rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    for run in programs.values():
        run()  # the first run of a schedule exchanges shapes
    print(json.dumps(list(programs)), flush=True)
    for name in sys.stdin:
        start = time.perf_counter()
        programs[name.strip()]()
        print(time.perf_counter() - start, flush=True)
    distributed.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("process-id", "port", "num-layers", "d-model", "num-heads", "seq-len", "batch-size")
    for name in names:
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def make_programs(
    args: argparse.Namespace, tokens: Tensor, targets: Tensor
) -> dict[str, Callable[[], object]]:
    """All schedules by name, one sequence a microbatch, and on process 0 the model as a whole."""

    def part(index: int, num_parts: int) -> PipelineStage:
        module = Part(args, index, num_parts)
        return PipelineStage(module, index, num_parts, torch.device("cpu"))

    def program(schedule: Any, parts: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for each in parts:
                each.submod.zero_grad()
            inputs = (tokens,) if args.process_id == 0 else ()
            schedule.step(*inputs, target=targets)

        return run

    programs: dict[str, Callable[[], object]] = {}
    if args.process_id == 0:
        whole = Part(args, 0, 1)

        def run_whole() -> None:
            whole.zero_grad()
            for row in range(args.batch_size):
                loss = loss_of(whole(tokens[row : row + 1]), targets[row : row + 1])
                (loss / args.batch_size).backward()

        programs["one core"] = run_whole
        programs["floor of one core"] = make_floor(args)
    one = part(args.process_id, 2)
    for name, kind in SINGLE.items():
        if kind is schedules.Schedule1F1B and args.batch_size < 2:
            continue  # it asks for a microbatch a stage
        programs[name] = program(kind(one, args.batch_size, loss_of), [one])
    for name, kind in CHUNKED.items():
        # A V goes down the processes and up again, so that process 0 has the first and the last.
        second = (
            3 - args.process_id if kind is schedules.ScheduleZBVZeroBubble else 2 + args.process_id
        )
        two: list[Any] = [part(args.process_id, 4), part(second, 4)]
        programs[name] = program(kind(two, args.batch_size, loss_of), two)
    return programs


def make_floor(args: argparse.Namespace) -> Callable[[], None]:
    """The matrix products of all blocks and sequences, three for each linear layer, and attention,
    forward and backward.
    """
    T, D, H = args.seq_len, args.d_model, args.num_heads
    widths = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    pairs = [(torch.randn(T, a), torch.randn(T, b), torch.randn(a, b)) for a, b in widths]
    q, k, v = (torch.randn(1, H, T, D // H, requires_grad=True) for _ in range(3))
    d_attn = torch.randn(1, H, T, D // H)

    def run() -> None:
        for _ in range(args.num_layers * args.batch_size):
            for x, d_y, weight in pairs:
                torch.mm(x, weight), torch.mm(d_y, weight.T), torch.mm(x.T, d_y)
            attn = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(attn, (q, k, v), d_attn)

    return run


if __name__ == "__main__":
    main()
