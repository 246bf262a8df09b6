"""What the page says first: did the guidance help, and where. From recorded figures; nothing here computes one anew."""

from report.figures import NAMES, number_of, together
from report.text import percent, signed

MODELS = ("reference", "guide", "policy")


def figures_of(run, stages):
    """({model: its final figures}, number of pairs or None): of run.json's table, before it of the last evaluations."""
    found, table = {}, run.get("table")
    for row in table if isinstance(table, list) else ():
        if isinstance(row, dict) and row.get("model") in MODELS:
            found[row["model"]] = {key: number_of(value) for key, value in row.items()}
    for stage in [] if found else stages:
        for row in (row for row in stage["rows"] if row.get("eval")):
            kept = {key.replace("dpo_", ""): number_of(row.get(key)) for key in row if key.startswith(("dpo_", "logr"))}
            found[stage["role"]] = kept | {"step": row["step"]}
    count = number_of(run.get("table_pairs"))
    return found, int(count) if count and count > 0 else None


def answer(run, config, loss, stages, classes):
    """The first section of a run's page: its title, words, and the charts of its picture. run: run.json;
    classes: of classes_of."""
    figures, count = figures_of(run, stages)
    held_out = bool(config.get("eval_data") or config.get("eval_fraction"))
    last = [row for stage in stages for row in stage["rows"] if row["stage"] == loss == "tgdpo" and row.get("eval")]
    phi = {key: number_of(last[-1].get(key)) if last else None for key in ("accuracy", "margin")}
    both = "Guide (DPO) and policy (TGDPO) on the same pairs"
    picture = both if len(stages) > 1 else f"The {stages[-1]['role'] if stages else 'policy'} against steps"
    title = "Did the guidance help, and where?" if loss == "tgdpo" else f"What {NAMES[loss]} did"
    charts = together([(stage["role"], stage["rows"]) for stage in stages])
    said = words(figures, count, held_out, classes, {} if None in phi.values() else phi)
    return {"title": title, "words": said, "picture": picture, "charts": charts}


def told(figures, *names):
    """Whether the figures of both guide and policy hold all these names."""
    both = [figures.get(model, {}) for model in ("guide", "policy")]
    return all(each.get(name) is not None for each in both for name in names)


def words(figures, count, held_out, cells, phi):
    """The answer as [(lead, text)]. figures, count: of figures_of; held_out: whether the pairs are; cells: classes_of;
    phi: the last evaluation's {accuracy, margin} of the loss's own margin, or {}."""
    said, (guide, policy) = [], (figures.get(model, {}) for model in ("guide", "policy"))
    pairs = f"{count or 'the'} {'held-out' if held_out else 'training'} pairs"
    if told(figures, "accuracy", "margin"):
        better, noise = policy["accuracy"] - guide["accuracy"], 2 * (0.25 / count) ** 0.5 if count else 0.0
        lead = "In ranking pairs, yes." if better > noise else "In ranking pairs, no." if better < -noise else ""
        lead = lead or "In ranking pairs, neither way that so few can show."
        text = (
            f"Of {pairs}, the policy (TGDPO) puts {percent(policy['accuracy'], 1)} in the labelled order by the plain "
        )
        text += f"DPO margin, the guide (DPO) {percent(guide['accuracy'], 1)}"
        text += f"; chance alone moves either by some {percent(noise, 1)}." if count else "."
        text += f" The mean margin is {signed(policy['margin'])} against {signed(guide['margin'])}."
        said.append((lead, text))
    if told(figures, "gold", "kl", "wins"):
        more = policy["gold"] > guide["gold"]
        lead = (
            f"By the true reward, {'yes' if more else 'no'}, at {'more' if policy['kl'] > guide['kl'] else 'less'} KL."
        )
        each = [
            f"{name} {signed(mine['gold'])} at KL {mine['kl']:.3g}, above the reference in {percent(mine['wins'], 1)}"
            for name, mine in (("guide", guide), ("policy", policy))
        ]
        said.append((lead, f"Known in this example alone, of sampled replies: {'; '.join(each)}."))
    if len(cells) == 4:
        n, (up, down, right, wrong) = sum(len(each["pairs"]) for each in cells), (len(c["pairs"]) for c in cells)
        text = f"Of the {n} pairs below, the policy turned {up} right that the guide has wrong, and {down} wrong that "
        said.append(("Where?", text + f"the guide has right; both have {right} right and {wrong} wrong."))
    if told(figures, "logratio_chosen", "logratio_rejected"):
        sides = [
            f"{s} {signed(guide[f'logratio_{s}'])} and {signed(policy[f'logratio_{s}'])}"
            for s in ("chosen", "rejected")
        ]
        lead = "Both responses lose likelihood." if policy["logratio_chosen"] < 0 else "The log-ratios."
        text = f"Summed log π/π_ref of guide and policy: {', '.join(sides)}. "
        text += (
            "What the guidance adds does not look at the label and tends to lower both responses (derive.md, D17-D19); "
        )
        said.append((lead, text + "the margin is the distance between the two."))
    if told(figures, "accuracy") and phi:
        text = f"{signed(phi['margin'])} in the mean, above 0 on {percent(phi['accuracy'], 1)} of the same pairs. Each "
        text += "token is weighed by f in it, as in none of the guide's figures: do not set it beside them."
        said.append(("φ, the margin that TGDPO optimises, is another figure:", text))
    if not said and policy.get("accuracy") is not None:
        text = f"{percent(policy['accuracy'], 1)} of {pairs} in the labelled order"
        said.append(("The policy:", f"{text}, mean margin {signed(policy.get('margin'))}."))
    return said


def classes_of(pairs, guided):
    """The kinds of pairs of the token view: list of {name, mark, note, pairs: numbers}, the pairs that tell most first.

    With guide and policy: by whether the guide's summed r̂ and the policy's plain DPO margin have the labelled order.
    Without a policy yet, or without a guide, by the summed reward alone."""
    pairs = [pair for pair in pairs if pair.margin is not None]
    if not pairs:
        return []
    if guided and all(pair.dpo_margin is not None for pair in pairs):
        cells = (
            ("turned right", "▲", "The guide ranks them wrong, the policy right", False, True),
            ("turned wrong", "▼", "The guide ranks them right, the policy wrong", True, False),
            ("both right", "✓", "Guide and policy rank them right", True, True),
            ("both wrong", "✗", "Guide and policy rank them wrong", False, False),
        )
        note = ", by the guide's summed r̂ and the policy's plain DPO margin, chosen less rejected."
        by, kind = "dpo_margin", lambda pair: (pair.margin > 0, pair.dpo_margin > 0)
    else:
        who = "guide" if guided else "policy"
        cells = (
            ("right", "✓", f"The {who} ranks them right", True),
            ("wrong", "✗", f"The {who} ranks them wrong", False),
        )
        note, by, kind = ", by its summed reward, chosen less rejected.", "margin", lambda pair: (pair.margin > 0,)
    classes = []
    for name, mark, words, *cell in cells:
        mine = [pair for pair in pairs if kind(pair) == tuple(cell)]
        mine.sort(key=lambda pair: -abs(getattr(pair, by)))
        classes.append({"name": name, "mark": mark, "note": words + note, "pairs": [pair.number for pair in mine]})
    return classes
