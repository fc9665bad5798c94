"""Tuning: codes stay fixed; scales, norms and biases are trained to reproduce the logits of the unquantized model.

The solver leaves each layer at the optimum of its own objective; what is left is how the errors of many layers add up.  So Adam (Kingma and
Ba, 2015) minimizes the divergence of the whole model's logits, straight through the rounding of activations.  It does so on
sequences of the calibration text that the codes were not fitted to: what is learnt there gains more on other text (docs/LOG.md).
Chen et al., "EfficientQAT" (2024), train step sizes end to end in the same way.  What is tuned is stored anyway: inference costs the same.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from modelutils import Decoder, run_block, sequences_place, skeleton
from processes import ALONE
from quant import fake_quant_act
from recipe import STEP_SAMPLES
from runtime import free_memory, multiplies_bfloat16

RATE = 1e-3  # learning rate relative to the size of each tensor, up to 4 bits; it falls to 0 along half a cosine
BETAS = (0.9, 0.95)  # of Adam
KEEP_EVERY = 5  # steps
GRAPH = 160  # bytes that a block keeps for its gradients, for each token and channel of its widest layer


class TunedLinear(nn.Module):
    """A quantized linear whose scales and bias can be trained, made from a frozen quant.QuantLinear, the codes (R, C) and the Grid.

    dtype: the type of its matrix product; bfloat16 holds codes of up to 8 bits exactly.
    """

    def __init__(self, linear, q, grid, dtype=torch.float32):
        super().__init__()
        self.acts, self.batch, self.in_scale, self.grid = linear.acts, linear.batch, linear.in_scale, grid
        self.register_buffer("whole", (q - grid.columns(grid.zero, q.shape[1])).to(dtype))  # (R, C): codes less zero
        scale, used = grid.scale.clone(), self.whole.any(1)
        if used.any():  # any scale will do for rows of zeros, but theirs, 1, would be the size of all
            scale[~used] = scale[used].mean(0)
        self.scale = nn.Parameter(scale)  # (R, G)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float())

    def forward(self, x):
        shape, x = x.shape, self.batch.split(x)
        x = x if self.in_scale is None else x / self.in_scale
        dtype = self.whole.dtype
        with torch.no_grad():
            off = fake_quant_act(x, *self.acts) - x
        x = (x + off).to(dtype)
        if self.scale.shape[1] == 1:  # scales of rows are factors of outputs: their gradient needs no product of its own
            y = F.linear(x, self.whole).float() * self.scale[:, 0]
        else:
            y = F.linear(x, (self.whole * self.grid.columns(self.scale, self.whole.shape[1])).to(dtype)).float()
        return (y if self.bias is None else y + self.bias).view(*shape[:-1], -1)


def read_by(world, steps):
    """The sequences that a process reads in these steps, in order."""
    return sorted({k for numbers in steps for k in world.own(numbers)})


def check_room(store, ids, device):
    """Raises UsageError if there is no room for what `tune` will keep."""
    done = len(store.tuning().get("divergence", ()))
    if own := read_by(store.world, plan(len(ids), store.recipe.tune_steps, store.recipe.seed)[done:]):
        place = teacher_place(store.original, ids[own], device)
        if place.folder:
            place.folder.cleanup()


def state_bytes(decoder, recipe):
    """Bytes that the state of an Optimizer takes in a file: three float32 for each scale; norms and biases are few."""
    block = decoder.empty_block(0)
    linears = [block.get_submodule(name) for name in decoder.linears]
    columns = [linear.in_features if recipe.groupsize == -1 else recipe.groupsize for linear in linears]
    return 12 * len(decoder) * sum(m.out_features * -(-m.in_features // c) for m, c in zip(linears, columns, strict=True))


def teacher_place(decoder, ids, device):
    """A Place for what a Teacher keeps.  Raises UsageError if there is none with room."""
    return sequences_place(decoder.config, torch.float32, ids.numel(), device, streams=2)


def is_quick(recipe, device):
    """Whether to multiply in bfloat16: the device has instructions for it, and the weights so few bits that it does not matter."""
    return recipe.wbits <= 4 and multiplies_bfloat16(device)


def logits_of(head, x, quick):
    """What a head makes of one sequence, x (1, T, D): (T, V) float32.  quick: by a product in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=quick):
        return head(x)[0].float()


class Teacher:
    """The unquantized Decoder on the sequences ids (n, T).  Its blocks run once, its head on every request; quick: in bfloat16."""

    @torch.no_grad()
    def __init__(self, decoder, ids, device, quick=False):
        decoder = as_float(decoder)
        self.device, self.head, self.quick = device, decoder.head(device), quick
        self.last = decoder.embed(ids.split(1), teacher_place(decoder, ids, device))
        self.first, self.arguments = list(self.last.x), {name: found for (name, _), found in self.last.arguments.items()}
        for i, block in decoder.visits(device, "reading the unquantized model"):
            with torch.autocast(device.type, torch.bfloat16, enabled=quick):
                self.last.propagate(block, f"block {i}")

    @torch.no_grad()
    def sequence(self, k):
        """For sequence k: the input (1, T, D) of the first block, the blocks' other arguments, and the wanted log-probabilities (T, V)."""
        return self.first[k].to(self.device), self.arguments, logits_of(self.head, self.last[k], self.quick).log_softmax(-1)


class Student:
    """The quantized model of a Store, its scales, norms and biases as parameters: {name in the model: parameter}.

    It is computed in float32; quick: the products of quantized linears and of the head in bfloat16.  Blocks are kept if there is room for
    all, and what their gradients need if there is room for that too; else each is built, or run again, whenever it is needed.
    """

    def __init__(self, store, device, tokens, quick=False):
        """tokens: of the sequences that run together."""
        self.store, self.device, self.quick = store, device, quick
        self.decoder = as_float(store.decoder())
        self.parameters, self.sizes, self.blocks = {}, {}, {}
        first, config = self._make(0), self.decoder.config
        size = sum(t.nbytes for t in (*first.parameters(), *first.buffers()))
        width = max(config.hidden_size, getattr(config, "ffn_dim", 0), getattr(config, "intermediate_size", 0))
        room, n = free_memory(device) / 2, len(self.decoder)
        self.keeps_blocks, self.keeps_graphs = n * size < room, n * (size + GRAPH * tokens * width) < room
        self.head = self.decoder.head(device).requires_grad_(False)
        norm = self.decoder.family.residual.final_norm
        for name, p in list(self.head.model.named_parameters()):
            path, _, attribute = name.rpartition(".")
            if path == norm:
                self._own(self.head.model.get_submodule(path), attribute, name, p)
        for i in range(len(self.decoder)):  # so that all parameters are there
            self.block(i)

    def _make(self, i):
        block, dtype = self.decoder.block(i).to(self.device), torch.bfloat16 if self.quick else torch.float32
        for name, (q, grid) in self.store.codes(i).items():
            block.set_submodule(name, TunedLinear(block.get_submodule(name), q, grid, dtype).to(self.device))
        return block.requires_grad_()

    def _own(self, module, attribute, name, p):
        """Put the parameter of this name into a module: a copy of p at first, which may be the store's."""
        if name not in self.parameters:
            self.parameters[name] = nn.Parameter(p.detach().clone())
            offset = self.decoder.family.norm_offset if attribute == "weight" else 0  # of linears there are scales and biases only
            self.sizes[name] = (p.detach() + offset).square().mean().sqrt().item()
        module._parameters[attribute] = self.parameters[name]

    def block(self, i):
        if i in self.blocks:
            return self.blocks[i]
        block = self._make(i)
        for name, p in list(block.named_parameters()):
            path, _, attribute = name.rpartition(".")
            self._own(block.get_submodule(path), attribute, f"{self.store.prefix}{i}.{name}", p)
        if self.keeps_blocks:
            self.blocks[i] = block
        return block

    def divergence(self, x, arguments, wanted):
        """The divergence from `wanted`, in nats, on a sequence of Teacher.sequence.  Gradients are added up."""
        steps = []
        for i in range(len(self.decoder)):
            x = x.detach().requires_grad_()
            with torch.set_grad_enabled(self.keeps_graphs):
                out = run_block(self.block(i), x, arguments[f"block {i}"], f"block {i}")
            steps.append((x, out))
            x = out
        x = x.detach().requires_grad_()
        logits = logits_of(self.head, x, self.quick)
        loss, gradient = divergence_of(logits.detach(), wanted)
        logits.backward(gradient)
        gradient = x.grad
        while steps:
            i, (x, out) = len(steps) - 1, steps.pop()
            if not self.keeps_graphs:
                out = run_block(self.block(i), x, arguments[f"block {i}"], f"block {i}")
            out.backward(gradient)
            gradient = x.grad
        return loss


def divergence_of(logits, wanted):
    """The mean divergence of logits (T, V) from the log-probabilities wanted (T, V), in nats, and its gradient (T, V).

    The gradient is written out, as autograd reads and writes T x V numbers several times more.
    """
    found, probable = logits.log_softmax(-1), wanted.exp()
    loss = (wanted - found).mul_(probable).sum().item() / len(wanted)
    return loss, found.exp_().sub_(probable).div_(len(wanted))


def as_float(decoder):
    """A Decoder that computes in float32."""
    return Decoder(skeleton(decoder.config, torch.float32), decoder.source, decoder.stored_dtype)


def plan(n, steps, seed):
    """The sequences (0 to n - 1) of every step: all of them once in random order, then all again."""
    generator = torch.Generator().manual_seed(seed)
    order = [k for _ in range(-(-steps * STEP_SAMPLES // n)) for k in torch.randperm(n, generator=generator).tolist()]
    return [order[s * STEP_SAMPLES : (s + 1) * STEP_SAMPLES] for s in range(steps)]


def tune(store, ids, device):
    """Tune the blocks of a finished Store by its recipe: the mean divergence of every step, in nats.

    ids (n, T): what to tune on; the processes of the store's world share the sequences of each step.  The result is in store.tuned
    afterwards.  Raises FloatingPointError for NaN or Inf.
    """
    world, steps = store.world, plan(len(ids), store.recipe.tune_steps, store.recipe.seed)
    quick = is_quick(store.recipe, device)
    student = Student(store, device, ids.shape[1], quick)
    rate = RATE * 2.0 ** (4 - max(4, store.recipe.wbits))  # with the steps of the grid
    optimizer = Optimizer(student.parameters, {name: rate * size for name, size in student.sizes.items()}, len(steps))
    found = optimizer.restore(store.tuning())
    if len(found) < len(steps):
        needed = read_by(world, steps[len(found) :])
        teacher = Teacher(store.original, ids[needed], device, quick) if needed else None  # there are more processes than STEP_SAMPLES
        for numbers in (bar := tqdm(steps[len(found) :], desc="tuning", unit="step", leave=False, initial=len(found), total=len(steps))):
            lost = world.total(sum(student.divergence(*teacher.sequence(needed.index(k))) for k in world.own(numbers))) / len(numbers)
            optimizer.step(len(found), len(numbers), world)
            found.append(lost)
            bar.set_postfix_str(f"divergence {lost:.4f}")
            if len(found) % KEEP_EVERY == 0 or len(found) == len(steps):
                store.keep_tuning(optimizer.state(found))
    store.tuned = {name: p.detach().cpu() for name, p in student.parameters.items()}
    return found


class Optimizer:
    """Adam on {name: parameter}, with a state that can be saved.  rates: {name: learning rate of the first step}."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters, rates, steps):
        self.parameters, self.rates, self.steps = parameters, rates, steps
        self.adam = torch.optim.Adam([{"params": [p]} for p in parameters.values()], betas=BETAS)

    def step(self, s, sequences, world=ALONE):
        """Step s, by the mean of the gradients of so many sequences, those of other processes among them."""
        for group, rate in zip(self.adam.param_groups, self.rates.values(), strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * s / self.steps)) / 2
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = torch.cat([p.grad.flatten() for p in self.parameters.values()])
        world.add(gradients)
        parts = gradients.div_(sequences).split([p.numel() for p in self.parameters.values()])
        for (name, p), gradient in zip(self.parameters.items(), parts, strict=True):
            if not gradient.isfinite().all():
                raise FloatingPointError(f"--tune_steps: NaN or Inf in the gradient of {name} at step {s + 1}")
            p.grad = gradient.view_as(p)
        self.adam.step()
        self.adam.zero_grad()

    def state(self, found):
        """{name: tensor} of all that is needed to go on.  found: the divergence of every step so far."""
        kept = {"divergence": torch.tensor(found, dtype=torch.float64)}
        for name, p in self.parameters.items():
            kept |= {f"{name}/value": p.detach()} | {f"{name}/{moment}": self.adam.state[p][moment] for moment in self.MOMENTS}
        return kept

    def restore(self, kept):
        """Go on from what `state` gave, or begin if that is {}: the divergence of every step so far."""
        if not kept:
            return []
        for name, p in self.parameters.items():
            p.data.copy_(kept[f"{name}/value"])
            moments = {moment: kept[f"{name}/{moment}"].to(p.device) for moment in self.MOMENTS}
            self.adam.state[p] = moments | {"step": torch.tensor(float(len(kept["divergence"])))}
        return kept["divergence"].tolist()
