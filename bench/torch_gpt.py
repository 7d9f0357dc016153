"""Trains a plain PyTorch GPT of given sizes for a few steps and prints figures of them as JSON.

    python bench/torch_gpt.py --num-layers=24 --d-model=2048 --num-heads=16 --seq-len=2048

What `bench/gpu.py` compares with: the model of GPT-2 and GPT-3 as this package has it, with float32
parameters, automatic mixed precision (bfloat16, or float16 before Ampere) with hidden states in the
short format as well, fused attention (scaled_dot_product_attention), fused AdamW and torch.compile.
Nothing is computed again in the backward pass. On a CPU it is float32 and not compiled.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-LayerNorm, attention and feed-forward."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn_in, self.attn_out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.ff_in, self.ff_out = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.attn_in(self.norm_1(x)).view(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(attn.transpose(1, 2).reshape(B, T, D))
        return x + self.ff_out(functional.gelu(self.ff_in(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """With learned positions, and a head tied to the embedding."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens = nn.Embedding(args.vocab_size, args.d_model)
        self.positions = nn.Embedding(args.seq_len, args.d_model)
        self.blocks = nn.ModuleList(
            Block(args.d_model, args.num_heads) for _ in range(args.num_layers)
        )
        self.norm = nn.LayerNorm(args.d_model)

    def forward(self, rows: Tensor) -> Tensor:
        """The mean loss of rows `[B, T + 1]`."""
        x = self.tokens(rows[:, :-1]) + self.positions.weight
        if torch.is_autocast_enabled(x.device.type):  # which leaves sums as they are
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def main() -> None:
    args = parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.cpu:
        sys.exit("this PyTorch sees no GPU: --cpu trains on the CPU")
    device = "cuda" if on_gpu else "cpu"
    is_new = on_gpu and torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if is_new else torch.float16
    torch.manual_seed(0)
    model = GPT(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    loss_of = torch.compile(model, disable=not on_gpu)
    rows = torch.randint(args.vocab_size, (args.batch_size, args.seq_len + 1), device=device)
    seconds = []
    for _ in range(args.rounds + 2):  # the first two compile and warm up
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=on_gpu):
            loss = loss_of(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    figures = {
        "seconds": statistics.median(seconds[2:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "num_params": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
    }
    print(json.dumps(figures))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("num-layers", "d-model", "num-heads", "seq-len"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU where there is no GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
