"""The recipe of a run, the methods and presets, and the names that flags take.  Imports no torch, so that --help is quick."""

from dataclasses import dataclass, replace


class UsageError(ValueError):
    """An error of the user.  The message names the value and the remedy; the scripts print it as one line."""


GRIDS = ("weight", "reformulated")
CLIPS = ("none", "mse", "hessian")
TARGETS = ("layer", "stream", "residual")
DTYPES = ("auto", "float16", "bfloat16", "float32")
ARITHMETICS = ("auto", "integers", "dequantized")
EXPORTS = ("compressed-tensors", "gguf")
KERNELS = ("auto", "cuda", "torch")
STEP_SAMPLES = 2  # calibration sequences of a step of tuning
MOST_BEAM = 128  # gptq.search_rows counts candidates in a byte
TUNE_SAMPLES = 256  # of all steps, at most; then they come again

# ---------------------------------------------------------------------------
# Methods

NEVER, OPTIONAL, ALWAYS = (False,), (False, True), (True,)  # the first is the default


@dataclass(frozen=True)
class Method:
    """A method: its functions, and the settings that it allows.

    weights: the function (W, stats, recipe, name) -> codes, Grid that rounds a weight; stats: the class of the statistics that it needs.
    Both are "module:name", resolved when a block is quantized.  acts, smooth: whether activations are quantized and smoothed.
    stream: the weights and stats that take their place with another target than the layer's own, where others do.
    """

    weights: str | None = None
    stats: str | None = None
    acts: tuple[bool, ...] = NEVER
    smooth: tuple[bool, ...] = NEVER
    stream: tuple[str, str] | None = None

    def fitted_to(self, target):
        """The method for a target, one of TARGETS."""
        return self if target == "layer" or not self.stream else replace(self, weights=self.stream[0], stats=self.stream[1])


METHODS = {
    "full": Method(),
    "act_only": Method(acts=ALWAYS, smooth=OPTIONAL),
    "rtn": Method("quant:rtn", acts=ALWAYS),
    "smoothquant": Method("quant:rtn", acts=ALWAYS, smooth=ALWAYS),
    "gptq": Method("gptq:quantize", "gptq:Hessian", acts=OPTIONAL, smooth=OPTIONAL, stream=("awrq:quantize", "awrq:Drift")),
    "awrq": Method("awrq:quantize", "awrq:Moments", acts=ALWAYS, smooth=OPTIONAL),
}

PLUS = {
    "rotate": True,
    "act_pertoken": True,
    "smooth": True,
    "smooth_search": True,
    "grid": "reformulated",
    "clip": "hessian",
    "percdamp": 0.03,
    "actorder": True,
    "true_sequential": True,
    "target": "stream",
    "bias_correction": True,
}
PRESETS = {  # defaults that take the place of the published ones; single flags override them
    "paper": {},
    "plus": PLUS,
    "serve": PLUS | {"act_sym": True},  # what vLLM can run
    "best": PLUS | {"target": "residual", "guided": True, "beam": 8, "tune_steps": 128},  # and what takes longer
}

# ---------------------------------------------------------------------------
# The recipe


@dataclass(frozen=True)
class Recipe:
    """Every setting that changes a number.  16 bits means: not quantized.  Raises UsageError for a setting out of range."""

    method: str = "full"
    wbits: int = 16
    act_bits: int = 16
    groupsize: int = -1  # columns that share one weight scale; -1: the whole row
    blocksize: int = 1  # columns rounded jointly; -1: one hundredth of the row
    sym: bool = False
    grid: str = "weight"  # what row grids are found from: the weight, or its reformulation, which is then rounded from the first column on
    clip: str = "none"  # how far the range of a grid may shrink: see quant.CLIPS
    act_pertoken: bool = False
    act_sym: bool = False
    rotate: bool = False  # the residual stream and the heads of values, by `seed`: see rotate.py
    smooth: bool = False
    alpha: float = 0.5
    min: float = 0.1
    smooth_search: bool = False  # an alpha for each group of linears, in place of `alpha`: see smoothquant.search_scale
    percdamp: float = 0.01
    beam: int = 1  # candidates for the codes of a row: see gptq.beam_search
    actorder: bool = False
    true_sequential: bool = False
    guided: bool = False  # tokens count by how much the loss depends on what a layer gives for them: see run/guide.py
    # What a layer's output is fitted to: that of its own input, or of its input in the unquantized model as well; or of the latter alone,
    # and what the residual stream has lost before, where the layer adds to that.
    target: str = "layer"
    target_mix: float = 0.5  # share of the unquantized model with "stream"
    bias_correction: bool = False
    tune_steps: int = 0  # gradient steps on scales, norms and biases, codes fixed, on `tune_samples` sequences: see run/tune.py
    rest_dtype: str = "auto"  # in which the tensors that are not quantized are kept; auto: as the checkpoint has them
    calib_data: str = "c4"
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0  # of the calibration draw and of the rotation

    @property
    def acts(self):
        """How activations are quantized: (bits, per token, symmetric), the arguments of quant.fake_quant_act."""
        return self.act_bits, self.act_pertoken, self.act_sym

    @property
    def collects(self):
        """Whether statistics of the calibration text are collected."""
        return bool(METHODS[self.method].stats or self.smooth or self.bias_correction)

    @property
    def calibrated(self):
        """Whether the quantized model depends on the calibration text."""
        return self.collects or self.tune_steps > 0

    @property
    def tune_samples(self):
        """How many calibration sequences there are to tune on, drawn after the `nsamples` that the codes are fitted to."""
        return min(TUNE_SAMPLES, STEP_SAMPLES * self.tune_steps)

    def __post_init__(self):
        for name, ok, allowed in (
            ("method", self.method in METHODS, ", ".join(METHODS)),
            ("wbits", self.wbits in (2, 3, 4, 5, 6, 7, 8, 16), "2 to 8, or 16 for unquantized weights"),
            ("act_bits", self.act_bits in (4, 5, 6, 7, 8, 16), "4 to 8, or 16 for unquantized activations"),
            ("groupsize", self.groupsize == -1 or self.groupsize > 0, "a positive number of columns, or -1 for whole rows"),
            ("blocksize", self.blocksize == -1 or self.blocksize > 0, "a positive number of columns, or -1 for one hundredth of them"),
            ("blocksize", 1 in (self.beam, self.blocksize), "1 with --beam, which rounds each column by itself"),
            ("beam", 1 <= self.beam <= MOST_BEAM, f"between 1 and {MOST_BEAM}"),
            ("grid", self.grid in GRIDS, " or ".join(GRIDS)),
            ("clip", self.clip in CLIPS, ", ".join(CLIPS)),
            ("target", self.target in TARGETS, " or ".join(TARGETS)),
            ("target", self.target != "residual" or self.true_sequential, "layer or stream without --true-sequential"),
            ("target_mix", 0 <= self.target_mix <= 1, "between 0, the layer's own input, and 1, the unquantized model's"),
            ("alpha", 0 <= self.alpha <= 1, "between 0 and 1"),
            ("min", 0 < self.min < float("inf"), "positive"),
            ("percdamp", 0 <= self.percdamp < float("inf"), "0 or more, for example 0.01"),
            ("tune_steps", self.tune_steps >= 0, "0 or more"),
            ("rest_dtype", self.rest_dtype in DTYPES, ", ".join(DTYPES)),
            ("nsamples", self.nsamples > 0, "a positive number of sequences"),
            ("seqlen", self.seqlen > 1, "at least 2 tokens"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not ok:
                raise UsageError(f"--{name} {getattr(self, name)}: must be {allowed}")
