"""The flags of both scripts, their types, and the parser that turns what is wrong into one line.  Imports nothing slow."""

import argparse
import logging
import sys
import warnings
from contextlib import contextmanager

from recipe import ARITHMETICS, CLIPS, DTYPES, EXPORTS, GRIDS, KERNELS, METHODS, PRESETS, TARGETS, UsageError

# ---------------------------------------------------------------------------
# One line for what is wrong


class Parser(argparse.ArgumentParser):
    """One line on stderr and exit status 2 for anything wrong with the input."""

    launch = None  # a run.launch.Launch: of several processes, the first that fails says why

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    def exit(self, status=0, message=None):
        if status and self.launch and not self.launch.speaks(status):
            message = None
        super().exit(status, message)

    @contextmanager
    def one_line_errors(self):
        """Turn errors of the user, of files, disk and network, and NaN into one line.  Our own bugs stay tracebacks."""
        try:
            yield
        except (UsageError, OSError, FloatingPointError) as e:
            self.error(e)

    def run(self, main):
        """main(args), with the libraries quiet: for the scripts that are not entry scripts."""
        args = self.parse_args()
        with self.one_line_errors():
            quiet_libraries()
            main(args)


def quiet_libraries(speaks=lambda text: True):
    """Silence the libraries, and print warnings as one line.  Raises UsageError if the installation cannot work.

    speaks(text) -> whether this process is the one that prints it.
    """
    import transformers
    from tqdm import tqdm
    from transformers.utils import is_kernels_available

    if is_kernels_available():
        raise UsageError(
            "Hugging Face's `kernels` is installed: transformers would take our folder of that name for it; pip uninstall kernels"
        )
    transformers.logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)  # those of libraries
    warnings.showwarning = lambda message, *_: speaks(str(message)) and tqdm.write(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------
# Types of values


def positive(number):
    """A whole number of at least 1."""
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return int(number)


def not_negative(number):
    """A whole number of at least 0."""
    if int(number) < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 0")
    return int(number)


def batch_size(number):
    """A whole number of at least 1, or "auto"."""
    return number if number == "auto" else positive(number)


def window_range(text):
    """(first, end) of "N" or "M:N"."""
    first, end = map(not_negative, text.split(":")) if ":" in text else (0, positive(text))
    if first >= end:
        raise argparse.ArgumentTypeError(f"{text}: has no window")
    return first, end


def share(number):
    """A number of items, or a share of them between 0 and 1."""
    value = float(number)
    if not (0 < value < 1 or value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{number}: must be a whole number of items, or a share between 0 and 1")
    return value if value < 1 else int(value)


def path(name):
    """The name of a file or folder, or a model's."""
    if not name:
        raise argparse.ArgumentTypeError("is empty; give a name, or leave the flag out")
    return name


def listed(names):
    """The names of a comma list, each once."""
    return tuple(dict.fromkeys(name for name in names.split(",") if name))


# ---------------------------------------------------------------------------
# Flags

SWITCH = argparse.BooleanOptionalAction  # a preset can switch it on, and --no-... off again


def add_flags(parser, smallest_scale, corpora):
    """The flags of both scripts.  smallest_scale: the default of --min, which the paper sets per family; corpora: that of --eval."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        type=path,
        help="hub name or local folder with config.json, tokenizer and weights; --load needs none",
    )
    add_method_flags(parser.add_argument_group("method"))
    add_smoothing_flags(parser.add_argument_group("rotation and smoothing"), smallest_scale)
    add_solver_flags(parser.add_argument_group("solver (gptq, awrq)"))
    add_tuning_flags(parser.add_argument_group("tuning"))
    add_data_flags(parser.add_argument_group("data"))
    add_evaluation_flags(parser.add_argument_group("evaluation"), corpora)
    add_task_flags(parser.add_argument_group("tasks (lm-evaluation-harness)"))
    add_checkpoint_flags(parser.add_argument_group("packed checkpoints"))
    add_machine_flags(parser.add_argument_group("run"))


def add_method_flags(group):
    group.add_argument(
        "--recipe", type=path, metavar="FILE", help="settings from YAML, or from the JSON that a run wrote; single flags override them"
    )
    group.add_argument("--method", choices=METHODS, default="full", help="how to quantize (default %(default)s: not at all)")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="paper: as published (default); plus: better; serve: plus that vLLM runs; best: plus and slow options; flags override it",
    )
    group.add_argument("--wbits", type=int, default=16, metavar="BITS", help="weight bits, 2 to 8; 16 = not quantized (default)")
    group.add_argument("--act_bits", type=int, default=8, metavar="BITS", help="activation bits, 4 to 8 (default 8); 16 = not quantized")
    group.add_argument("--act_quant", action="store_true", help="gptq: quantize activations too (the other methods' is implied)")
    group.add_argument("--act_pertoken", action=SWITCH, default=False, help="one activation scale per token instead of per sequence")
    group.add_argument("--act_sym", action=SWITCH, default=False, help="symmetric activation grid (default asymmetric)")
    group.add_argument("--groupsize", type=int, default=-1, metavar="COLUMNS", help="columns per weight scale; -1 = whole row (default)")
    group.add_argument("--sym", action="store_true", help="symmetric weight grid (default asymmetric)")
    group.add_argument(
        "--clip",
        choices=CLIPS,
        default="none",
        help="shrink each weight range to what costs least: mse, by the weights' own errors; hessian, by those of outputs (default none)",
    )
    group.add_argument(
        "--bias_correction", action=SWITCH, default=False, help="where there is a bias, take the mean error of the output into it"
    )


def add_smoothing_flags(group, smallest_scale):
    group.add_argument("--rotate", action=SWITCH, default=False, help="rotate residual stream and values first: the same function")
    group.add_argument("--smooth", action=SWITCH, help="smooth activations first (default: only smoothquant does)")
    group.add_argument("--alpha", type=float, default=0.5, help="share of the difficulty moved to the weights, 0 to 1 (default 0.5)")
    group.add_argument(
        "--min",
        type=float,
        default=smallest_scale,
        help="smallest smoothing scale (default %(default)s; opt.py 0.1, main.py 0.01, as in the paper)",
    )
    group.add_argument(
        "--smooth_search",
        action=SWITCH,
        default=False,
        help="for each group of linears the alpha at which rounding is expected to cost least, or no smoothing",
    )


def add_solver_flags(group):
    group.add_argument("--percdamp", type=float, default=0.01, help="damping, as a share of the mean Hessian diagonal (default 0.01)")
    group.add_argument(
        "--blocksize", type=int, default=1, metavar="COLUMNS", help="columns rounded jointly (default 1; -1 = 1 %% of a row)"
    )
    group.add_argument(
        "--beam",
        type=positive,
        default=1,
        metavar="K",
        help="candidates for the codes of a row that are kept (default 1)",
    )
    group.add_argument(
        "--actorder", action=SWITCH, default=False, help="round the columns with the largest inputs first; groups stay in place"
    )
    group.add_argument("--true-sequential", action=SWITCH, default=False, help="let each group of linears see the ones before it quantized")
    group.add_argument(
        "--guided", action=SWITCH, default=False, help="weigh tokens by the gradient of the loss at the outputs of each layer"
    )
    group.add_argument(
        "--grid",
        choices=GRIDS,
        default="weight",
        help="find the ranges of rows in the weight, as published (default), or in its reformulation, which is what is rounded",
    )
    group.add_argument(
        "--target",
        choices=TARGETS,
        default="layer",
        help="fit outputs to those of a layer's own input (default), or to the unquantized model's too, which runs beside (stream), and let"
        " what is added to the residual stream give back what that has lost (residual)",
    )
    group.add_argument(
        "--target_mix", type=float, default=0.5, metavar="BETA", help="share of the unquantized model in the target, 0 to 1 (default 0.5)"
    )


def add_tuning_flags(group):
    group.add_argument(
        "--tune_steps",
        type=int,
        default=0,
        metavar="N",
        help="gradient steps on weight scales, norms and biases, towards the unquantized model's logits, on two further sequences of the"
        " calibration text each; codes stay (default 0)",
    )


def add_data_flags(group):
    group.add_argument(
        "--calib_data",
        default="c4",
        metavar="CORPUS",
        help="c4 (default), c4-joined, wikitext2, ptb, a folder of --data_dir, or hub:OWNER/NAME[:CONFIG]:SPLIT",
    )
    group.add_argument("--nsamples", type=int, default=128, metavar="N", help="calibration sequences (default 128)")
    group.add_argument("--seqlen", type=int, metavar="TOKENS", help="tokens per sequence (default: the model's context, at most 2048)")
    group.add_argument("--seed", type=int, default=0, help="seed of the calibration draw and of the rotation (default 0)")
    group.add_argument(
        "--data_dir",
        type=path,
        metavar="FOLDER",
        help="local corpora, NAME/SPLIT.txt, .jsonl, .jsonl.gz, .json, .csv or .parquet; only hub:... is then downloaded",
    )
    group.add_argument(
        "--text_field", type=path, default="text", metavar="NAME", help="field or column that has the text of a corpus' rows (default text)"
    )


def add_evaluation_flags(group, corpora):
    group.add_argument(
        "--eval",
        default=corpora,
        metavar="CORPORA",
        help=f"perplexity on these, comma list of names as for --calib_data, and those of docs/protocols.md (default {corpora or 'none'})",
    )
    group.add_argument(
        "--eval_windows", type=window_range, metavar="N", help="only the first N windows of each corpus, or M:N, those from M to N - 1"
    )
    group.add_argument("--new-eval", action="store_true", help="ptb-new for ptb and c4-new for c4: GPTQ's later protocols, not the paper's")
    group.add_argument("--compare_full", action="store_true", help="evaluate the unquantized model too, corpora and tasks, in the same run")
    group.add_argument(
        "--benchmark", type=positive, metavar="TOKENS", help="decode so many tokens of the first corpus one by one: milliseconds per token"
    )
    group.add_argument(
        "--benchmark_prefill",
        type=positive,
        metavar="TOKENS",
        help="read so many tokens of the first corpus at once, as a prompt: milliseconds",
    )
    group.add_argument("--check", action="store_true", help="with --benchmark: their perplexity too")


def add_task_flags(group):
    group.add_argument("--tasks", default="", metavar="NAMES", help="comma list, wildcards or YAML files; storycloze is storycloze_2018")
    group.add_argument(
        "--num_fewshot", type=not_negative, metavar="N", help="examples before each item (default: as the task says, else 0)"
    )
    group.add_argument(
        "--batch_size", type=batch_size, default=1, metavar="N", help="items run together, or auto (default 1); changes no result"
    )
    group.add_argument("--limit", type=share, metavar="N", help="items per task, the first ones; below 1 a share of them (default: all)")
    group.add_argument("--skip_missing", action="store_true", help="leave out tasks whose data is not there")
    group.add_argument(
        "--apply_chat_template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="put prompts into the tokenizer's chat template, or into the one of its templates that has this name",
    )
    group.add_argument("--system_instruction", metavar="TEXT", help="the system's turn, or a text before each prompt without a template")
    group.add_argument(
        "--fewshot_as_multiturn", action=SWITCH, help="examples become turns of their own (default: if there is a chat template)"
    )
    group.add_argument("--table_results", action="store_true", help="print the tasks as a Markdown table (default: as JSON)")


def add_checkpoint_flags(group):
    group.add_argument("--save", type=path, metavar="FOLDER", help="write the quantized model, its codes packed, into a new folder")
    group.add_argument("--load", type=path, metavar="FOLDER", help="evaluate what --save wrote, in place of quantizing")
    group.add_argument(
        "--checkpoint_dir", type=path, metavar="FOLDER", help="keep finished blocks there, and go on after the last one it has"
    )
    group.add_argument(
        "--export",
        nargs=2,
        type=path,
        metavar=("FORMAT", "FOLDER"),
        help=f"write the model for others into a new folder; FORMAT: {', '.join(EXPORTS)}",
    )
    group.add_argument(
        "--gguf_like",
        type=path,
        metavar="FILE",
        help="with --export gguf: the original model in GGUF, for tokenizer and metadata",
    )
    group.add_argument(
        "--rest_dtype",
        choices=DTYPES,
        default="auto",
        help="type of the tensors that are not quantized, embeddings too; auto = as the checkpoint has them (default)",
    )
    group.add_argument(
        "--push_to_hub", type=path, metavar="REPO", help="send the folder of --save or --export to the Hugging Face hub when it is finished"
    )
    group.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        default="auto",
        help="with --load: compute in integers, or dequantize once; auto (default): integers, but on a CPU --benchmark dequantizes",
    )
    group.add_argument(
        "--kernel",
        choices=KERNELS,
        default="auto",
        help="with --load: what computes integers; auto (default): cuda on a GPU if its kernels can be built, else torch",
    )


def add_machine_flags(group):
    group.add_argument("--device", metavar="NAME", help="cuda, cuda:N or cpu (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto = the checkpoint's, but float32 on a CPU (default)")
    group.add_argument("--walk_batch", type=positive, metavar="N", help="sequences run together (default: from the memory)")
    group.add_argument("--output_path", type=path, metavar="FILE", help="write results and their whole protocol to this JSON")


def make_parser(script, doc, smallest_scale, corpora):
    """The parser of a script.  doc: its docstring; the others: see add_flags."""
    parser = Parser(prog=script, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, smallest_scale, corpora)
    return parser
