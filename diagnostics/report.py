"""diag.py report: write a report of a training run (settings, curves, pictures, grades) into one HTML file."""

import base64
import functools
import html
import io
import json
import math
import shlex
import statistics
import tempfile
from pathlib import Path

import torch

from diagnostics.delta import delta, relative_norm
from diagnostics.drift import drift, open_encoder
from diagnostics.listen import cell, draw_sheet
from diagnostics.logits import logits, open_dataset
from diagnostics.plan import Job
from nano.evaluate import SUITE_NAMES, gradable, listen
from nano.world import NEW_WORDS, parse_words, prompts
from nanowan.errors import BadInput, check_at_least
from nanowan.files import atomic
from nanowan.formats.header import read_header
from nanowan.pipeline import Pipeline
from nanowan.prompts import read_texts
from nanowan.settings import checkpoint_dir
from nanowan.training.captions import has_keyword
from nanowan.training.keywords import parse_keyword
from nanowan.training.log import duration
from nanowan.training.run_dir import adapter_file

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em} h2{margin-top:2em;font-size:1.15em;border-bottom:1px solid #ddd}
img{max-width:100%;display:block;margin:.6em 0} table{border-collapse:collapse;font-size:13px}
td,th{border:1px solid #ddd;padding:2px 9px;text-align:left;overflow-wrap:anywhere} th{background:#f6f6f6}
p.note{color:#666;font-size:13px}"""


# ---- pieces of HTML ----------------------------------------------------------------------------------------------
def image(png):
    """Return an <img> element with the bytes of a PNG embedded in it."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def figure(draw, width=7.0, height=2.6):
    """Return an <img> element with a plot. draw: a function that draws the plot on matplotlib axes. width, height: in
    inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    draw(axes)
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=110)
    pyplot.close(fig)
    return image(png.getvalue())


def line_plot(x, y, label, **axes_settings):
    def draw(axes):
        axes.plot(x, y, linewidth=0.7)
        axes.set(xlabel="step", ylabel=label, **axes_settings)

    return figure(draw, height=1.8)


def heat_map(rows, key, label, scale=1):
    """Return an <img> element with a heat map of scale * entry[key] for the entries of the list `rows`, which `delta`
    or logit_rows returned. The map has a column for each block and a row for each kind. If several entries have the
    same block and kind, their largest value is shown. Entries whose block is None are left out. label: text at the
    colour bar.
    """
    rows = [r for r in rows if r["block"] is not None]
    kinds, blocks = sorted({r["kind"] for r in rows}), sorted({r["block"] for r in rows})
    grid = torch.full((len(kinds), len(blocks)), math.nan)
    for r in rows:
        i, j = kinds.index(r["kind"]), blocks.index(r["block"])
        grid[i, j] = max(scale * r[key], -math.inf if grid[i, j].isnan() else grid[i, j].item())

    def draw(axes):
        colors = axes.imshow(grid, aspect="auto", cmap="YlOrRd", vmin=0)
        ticks = dict(xticks=range(len(blocks)), xticklabels=blocks, yticks=range(len(kinds)), yticklabels=kinds)
        axes.set(xlabel="block", **ticks)
        axes.figure.colorbar(colors, label=label)

    return figure(draw, 7, 1.3 + 0.3 * len(kinds))


def table(head, rows):
    def row(cells, tag):
        texts = [f"{c:.4g}" if isinstance(c, float) else html.escape(str(c)) for c in cells]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(r, "td") for r in rows) + "</table>"


# ---- sections ----------------------------------------------------------------------------------------------------
class TrainingRun:
    """A training run, read from its output folder. Raises BadInput if the folder holds no run or no step is logged."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.record = json.loads((self.folder / "flags.json").read_text())
            self.log = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
            self.flags, self.started = self.record["flags"], self.record["started"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{folder}: not the --out of a training run ({e})") from None
        self.steps = [row for row in self.log if "loss" in row]
        if not self.steps:
            raise BadInput(f"{folder}: no step has been logged yet")
        name = self.flags.get("name", "adapter_model")
        files = [adapter_file(self.folder, name, expert) for expert in ("dit", "high", "low")]
        self.adapters = [f for f in files if f.exists()]
        encoder = self.folder / "text_encoder.safetensors"
        self.encoder = encoder if encoder.exists() else None
        self.ckpt = checkpoint_dir(self.flags["ckpt"])
        self.data = {key: self.flags[key] for key in ("data", "cache", "resolution", "frames")}
        self.script = "train_lora" if "targets" in self.flags else "train_te"
        used = str(self.encoder) if self.encoder else self.flags["text_encoder"]
        self.changes = {"loras": [str(f) for f in self.adapters], "text_encoder": used}
        # the text encoder that the run was given, on top of which it trained
        self.before = {"text_encoder": self.flags["text_encoder"]} if self.flags["text_encoder"] else {}

    @property
    def name(self):
        return self.folder.resolve().name

    @property
    def words(self):
        """The words in the run's --keywords and --trigger."""
        flags = [*(self.flags.get("keywords") or []), *(self.flags.get("trigger") or [])]
        return [parse_keyword(text).name for text in flags]

    @functools.cached_property
    def captions(self):
        """All captions of the run's data."""
        return open_dataset(Pipeline(self.ckpt), **self.data).captions

    def columns(self):
        """Return {column name: keyword arguments of a Pipeline} for the models to compare: the base; the base with the
        text encoder that the run was given or, if none was given, trained; and the model after the run.
        """
        columns = {"base": {}}
        if self.before or self.encoder:
            columns["+ encoder"] = self.before or self.changes
        if self.before and self.encoder:  # the run continued from another encoder
            columns["+ trained on"] = self.changes
        if self.adapters:
            columns["+ encoder + translator" if self.before else "+ translator"] = self.changes
        return columns

    def changed_flags(self):
        """Return {flag: value} of the run's flags that differ from the defaults for its checkpoint, without --ckpt,
        --device, --dtype, --resume and --config.
        """
        defaults = vars(Job(self.script, ["--ckpt", str(self.ckpt), "--device", "cpu"]).args)
        passed_over = {"ckpt", "device", "dtype", "resume", "config"}
        return {k: v for k, v in self.flags.items() if k not in passed_over and v not in ([], defaults.get(k))}

    def command(self):
        """Return a command line that repeats this run with the default device and dtype."""
        words = ["python", f"{self.script}.py", "--ckpt", self.flags["ckpt"]]
        for name, value in self.changed_flags().items():
            words += words_of_flag(name, value)
        return shlex.join(words)


def words_of_flag(name, value):
    """Return the words of a command line that set the flag `name` to `value`, or [] if the value is None or False."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if name == "data" and not isinstance(value, str):
        values = [v["source"] if [*v] == ["source"] else json.dumps(v) for v in value]
        return [word for text in values for word in ("--data", text)]
    if name in ("text_encoder", "init_lora") and not isinstance(value, str):
        return [word for text in value for word in (f"--{name}", text)]
    if isinstance(value, list):
        return [f"--{name}", ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)]
    return [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]


def held_out_losses(run):
    """Return {name: [(step, loss)]} of the held-out losses in the log of a TrainingRun."""
    names = sorted({k for row in run.log for k in row if k.startswith("val_loss") and "by_t" not in k})
    return {name: [(row["step"], row[name]) for row in run.log if name in row] for name in names}


def shown_range(curves):
    """Return (lowest, highest), the limits of a logarithmic axis that shows all positive values in `curves`, lists of
    numbers, with a margin.
    """
    values = [v for curve in curves for v in curve if v > 0 and math.isfinite(v)]
    return (0.8 * min(values), 1.25 * max(values)) if values else (0.1, 1)


def run_section(run):
    """Return HTML parts with the run's command, its duration, and its flags that are not at their defaults."""
    times = [row["ms"] for row in run.steps if "ms" in row]
    took = ""
    if times:
        took = f", {duration(sum(times) / 1000)} of steps ({statistics.median(times) / 1000:.2g} s in the median)"
    return [
        f"<p>{len(run.steps)} steps of {run.script}.py{took}, started {run.started}</p>",
        f"<pre>{html.escape(run.command())}</pre>",
        "<p>Not the defaults:</p>",
        table(("flag", "value"), run.changed_flags().items()),
    ]


def loss_section(run):
    """Return HTML parts with plots of the losses, the learning rate and the gradient norm. The loss varies much from
    step to step, so its axis shows the range of its mean over 25 steps and of the held-out loss.
    """
    x, y = [row["step"] for row in run.steps], [row["loss"] for row in run.steps]
    mean = [sum(y[max(0, i - 24) : i + 1]) / min(i + 1, 25) for i in range(len(y))]
    held_out = held_out_losses(run)

    def draw(axes):
        axes.plot(x, y, color="#ddd", linewidth=0.7, label="each step, where in range")
        axes.plot(x, mean, color="#c0392b", label="mean of 25")
        limits = shown_range([mean, *([v for _, v in points] for points in held_out.values())])
        axes.set(xlabel="step", ylabel="loss", yscale="log", ylim=limits)
        axes.legend(frameon=False, fontsize=8)

    def draw_held_out(axes):
        for name, points in held_out.items():
            axes.plot(*zip(*points), "o-", markersize=3, label=name.replace("_", " "))
        axes.set(xlabel="step", ylabel="held-out loss")
        axes.legend(frameon=False, fontsize=8)

    steps = [row["step"] for row in run.steps]
    return [
        "<h2>Loss</h2>",
        figure(draw),
        *([figure(draw_held_out, height=1.8)] if held_out else []),
        "<h2>Learning rate and gradient</h2>",
        line_plot(steps, [row["lr"] for row in run.steps], "learning rate"),
        line_plot(steps, [row["grad_norm"] for row in run.steps], "gradient norm", yscale="log"),
    ]


def adapter_section(run, file):
    expert = read_header(file)[1].get("expert", "dit")
    rows = delta(file, Pipeline(run.ckpt).folder(expert))
    ranks = [r["rank"] for r in rows]
    return [
        f"<h2>How far the weights moved: {file.name}</h2>",
        heat_map(rows, "ratio", "||dW|| / ||W||, %", 100),
        f"<p>All together {100 * relative_norm(rows):.2f} %; spectral norm up to {max(r['spectral'] for r in rows):.3g}"
        f"; effective rank {min(ranks):.1f} to {max(ranks):.1f}.</p>",
    ]


def encoder_section(run):
    parts = []
    rows = [r for r in delta(run.encoder, run.ckpt) if r["block"] is not None]
    if rows:
        parts += ["<h2>How far the encoder's weights moved</h2>", heat_map(rows, "ratio", "||dW|| / ||W||, %", 100)]
    if gradable(Pipeline(run.ckpt).settings):
        texts = [row["prompt"] for row in prompts(20, 0)]
    else:
        texts = read_texts(run.flags["previews"], "--previews") if run.flags["previews"] else []
    if not texts:
        return parts
    moved = drift(open_encoder(run.ckpt, run.ckpt), open_encoder(run.encoder, run.ckpt), texts, run.flags["keywords"])
    rows = [(row["prompt"], row["cosine"], row["norm"]) for row in moved["prompts"]]
    parts += ["<h2>How far the embeddings moved</h2>", table(("prompt", "cosine", "norm x"), rows)]
    if moved["keywords"]:
        rows = [
            (word, *(", ".join(f"{w} {cosine:.2f}" for w, cosine in side) for side in sides))
            for word, sides in moved["keywords"].items()
        ]
        parts.append(table(("keyword", "nearest before", "nearest after"), rows))
    return parts


def logits_section(run):
    parts = []
    before = run.before.get("text_encoder") if run.adapters else None
    for name, rows in logits(run.flags["ckpt"], n=2, base_encoder=before, **run.data, **run.changes).items():
        expert = "" if name == "dit" else f", {name}-noise expert"
        against = ", against the base with the run's own --text_encoder" if before else ""
        parts.append(f"<h2>Attention logits{expert}: largest relative change of a head{against}</h2>")
        parts.append(heat_map(rows, "drift", "drift"))
    return parts


def previews_section(run):
    files = sorted((run.folder / "previews").glob("step_" + "[0-9]" * 6 + ".png"))
    parts = ["<h2>Previews</h2>"] if files else []
    for file in dict.fromkeys(files[:1] + files[-1:]):
        parts += [f"<p class=note>{file.stem.replace('_', ' ')}</p>", image(file.read_bytes())]
    return parts


def graded_words(run):
    """Return the new words of the nano world that the run's captions, its --keywords or its --trigger contain."""
    words = {word for caption in run.captions for word in caption.split()} | {*run.words}
    return [word for word in NEW_WORDS if word in words]


def listening_section(run, n):
    """Return HTML parts with the accuracy of each column of run.columns(), all on the same prompts and seeds. n:
    prompts per new word.
    """
    scores, words = {}, graded_words(run)
    for name, changes in run.columns().items():
        print(f"listening: {name}", flush=True)
        scores[name] = listen(Pipeline(run.flags["ckpt"], **changes), words, n, progress=True)
    first = next(iter(scores.values()))
    rows = [
        (SUITE_NAMES.get(suite, suite), kind, *(cell(stage[suite][kind]) for stage in scores.values()))
        for suite, kinds in first.items()
        for kind in kinds
    ]
    table_of_scores = table(("suite", "attribute", *scores), rows)
    asked = f"{n} prompts of each new word" if words else "no new word that can be graded"
    note = f"<p class=note>accuracy, with its 95 % interval; {asked}; all columns from the same seeds</p>"
    return ["<h2>Prompt adherence</h2>", table_of_scores, note]


def words_section(run):
    """Return HTML parts with clips for at most six of the run's words that cannot be graded. For each word, every
    column of run.columns() samples the same caption from the same seed.
    """
    words = [word for word in run.words if word not in NEW_WORDS][:6]
    asked = [next((c for c in run.captions if has_keyword(c, [word])), word) for word in words]
    if not asked:
        return []
    columns = {name: Pipeline(run.flags["ckpt"], **changes) for name, changes in run.columns().items()}
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder) / "words.png"
        draw_sheet(columns, asked, 0, sheet)
        png = sheet.read_bytes()
    note = "<p class=note>not graded: what they mean is not known; report --words WORD=MEANING grades them</p>"
    return [f"<h2>The run's own words: {html.escape(', '.join(words))}</h2>", image(png), note]


def report(folder, n=20):
    """Return one self-contained HTML page about a training run: its command, losses and learning rate; how far weights,
    attention logits and embeddings moved; previews from its start and end; its flags and versions. If the checkpoint is
    nano and n is not 0, the page has two more sections: the accuracy on graded prompts, and clips of the run's words
    that cannot be graded.

    folder: the run's --out. n: number of prompts for each word in graded_words; the known words together get as many
    prompts as these words together. Raises BadInput if the folder holds no run.
    """
    run = TrainingRun(folder)
    graded = n and gradable(Pipeline(run.ckpt).settings)
    if graded and (unknown := [word for word in run.words if word not in NEW_WORDS]):
        print(
            f"not graded, as what they mean is not known: {', '.join(unknown)}; give --words WORD=MEANING", flush=True
        )
    title = html.escape(run.name)
    parts = [f"<h1>{title}</h1>", *run_section(run), *loss_section(run)]
    for file in run.adapters:
        print(f"how far {file.name} moves the weights", flush=True)
        parts += adapter_section(run, file)
    if run.encoder:
        print("how far the encoder and its embeddings moved", flush=True)
        parts += encoder_section(run)
    print("attention logits before and after", flush=True)
    parts += logits_section(run)
    parts += previews_section(run)
    if graded:
        parts += listening_section(run, n) + words_section(run)
    parts += ["<h2>Flags</h2>", table(("flag", "value"), run.flags.items())]
    versions = [(key, value) for key, value in run.record.items() if key != "flags"]
    parts += ["<h2>Versions</h2>", table(("what", "which"), versions)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}</body></html>\n'


def run(args):
    check_at_least(0, n=args.n)
    parse_words(",".join(args.words))  # adds the words to NEW_WORDS, so that they can be graded
    page = report(args.folder, args.n)
    out = Path(args.out or Path(args.folder) / "report.html")
    with atomic(out) as tmp:
        tmp.write_text(page, encoding="utf-8")
    print(out)
