"""The efficacy study on the pocket model: what do the strategies gain where routing is wrong, and what do they cost?

| script | question |
|---|---|
| `plan.py` | which variants, with which options, on which sets? Data; read this one first |
| `place.py` | where does a study live, and what do its variants share: questions, tuned options, thresholds, masks? |
| `oracles.py` | how much room has routing on each set? `python -m demos.study.oracles` |
| `run.py` | tune on dev, score on test, from where it was left. `python -m demos.study.run` |
| `collect.py` | from folders of runs to one `docs/results.json` |
| `arithmetic.py` | differences, Holm over the whole study, share of the gap closed, targets |
| `example.py` | one worked example, before and after |
| `page.py`, `tables.py`, `pictures.py` | the page, from `docs/results.json` alone. `python -m demos.study.page` |

`make artefacts` runs all of it, and what it depends on, where something changed (`demos/artefacts.py`).
"""
