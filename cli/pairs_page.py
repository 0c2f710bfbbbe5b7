"""The page of side-by-side pairs. It holds pictures without names; which side is which follows from the seed alone."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdedit.cli.page import data_url, page

if TYPE_CHECKING:
    from sdedit.opinions import Trial
    from sdedit.pairing import PictureFolder

STYLE = """
body { max-width: 72rem; text-align: center }
#guide { display: inline-block; margin: 0 auto 1rem } #guide[hidden] { display: none }
#pair { display: flex; gap: 1.5rem; justify-content: center; margin: 1rem 0 }
button { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem; cursor: pointer }
button:hover, button:focus-visible { border-color: var(--accent); outline: 2px solid var(--accent) }
#pair img, #guide img { width: min(40vw, 20rem); height: auto } #guide img { width: min(30vw, 14rem) }
progress { width: 20rem; max-width: 80%; accent-color: var(--accent) }
"""

BODY = """
<h1 id="question"></h1>
<p class="soft">Click the picture, or press ← or →. There is no right answer: take the first that comes to mind.</p>
<div id="guide"><img alt="guide"><div class="soft">guide</div></div>
<div id="pair"><button data-side="left"><img alt="left"></button>
<button data-side="right"><img alt="right"></button></div>
<p><progress id="bar"></progress><br><span class="soft" id="done"></span></p>
<p><button id="back">Back</button> <button id="save">Save answers</button></p>
"""

SCRIPT = """
const { study, questions, pictures, trials } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id), answers = [];
let since = 0;
function show() {
  const at = answers.length, trial = trials[at];
  byId("bar").max = trials.length; byId("bar").value = at;
  byId("done").textContent = trial ? `${at} of ${trials.length}` : "Thank you. Please save your answers.";
  byId("pair").hidden = !trial; byId("pair").style.display = trial ? "" : "none";
  byId("question").textContent = trial ? questions[trial.question] : "Done";
  byId("guide").hidden = !trial || trial.guide === null;
  byId("back").disabled = at === 0;
  if (!trial) return;
  document.querySelectorAll("#pair img").forEach((img, i) => { img.src = pictures[i ? trial.right : trial.left]; });
  if (trial.guide !== null) document.querySelector("#guide img").src = pictures[trial.guide];
  since = performance.now();
}
function choose(chosen) {
  const trial = trials[answers.length];
  if (!trial) return;
  const seconds = Math.round(performance.now() - since) / 1000;
  answers.push({ question: trial.question, name: trial.name, chosen, seconds });
  show();
}
document.querySelectorAll("#pair button").forEach((b) => b.addEventListener("click", () => { choose(b.dataset.side); b.blur(); }));
document.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") choose("left");
  if (event.key === "ArrowRight") choose("right");
});
byId("back").addEventListener("click", () => { answers.pop(); show(); });
byId("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ study, answers }, null, 1)], { type: "application/json" }));
  link.download = "answers.json";
  link.click();
});
addEventListener("beforeunload", (event) => { if (answers.length) event.preventDefault(); });
show();
"""  # noqa: E501


def pairs_page(
    study: Mapping[str, Any],
    questions: Mapping[str, str],
    trials: "Sequence[Trial]",
    folders: "tuple[PictureFolder, PictureFolder, PictureFolder | None]",
    size: tuple[int, int],
) -> str:
    """The document. folders: of A, of B, and of guides; each picture is in it once. Raises ImageError."""
    a, b, guides = folders
    pictures: list[str] = []
    numbers: dict[tuple[int, str], int] = {}

    def number(folder: "PictureFolder", name: str) -> int:
        key = id(folder), name
        if key not in numbers:
            numbers[key] = len(pictures)
            pictures.append(data_url(folder.read([name], frame=size)[0]))
        return numbers[key]

    shown = []
    for trial in trials:
        left, right = (a, b) if trial.a_is_left else (b, a)
        guide = number(guides, trial.name) if guides is not None and trial.question == "faithfulness" else None
        sides = {"left": number(left, trial.name), "right": number(right, trial.name)}
        shown.append({"question": trial.question, "name": trial.name, "guide": guide, **sides})
    data = {"study": dict(study), "questions": dict(questions), "pictures": pictures, "trials": shown}
    held = json.dumps(data).replace("<", "\\u003c")  # a name must not end the element
    return page(
        "Which one?", f'{BODY}<script id="data" type="application/json">{held}</script>', style=STYLE, script=SCRIPT
    )
