"""What the page says first: did the guidance help, and where. From recorded figures; nothing here computes one anew."""

from report.figures import NAMES, SIDES, number_of, together
from report.text import signed


def figures_of(run, stages):
    """({model: its final figures}, number of pairs or None): of run.json's table, before it of the last evaluations."""
    table = [row for row in run["table"] if isinstance(row, dict)] if isinstance(run.get("table"), list) else []
    table = [row for row in table if row.get("model") in ("guide", "policy")]
    found = {row["model"]: {key: number_of(value) for key, value in row.items()} for row in table}
    for stage in [] if found else stages:
        for row in (row for row in stage["rows"] if row.get("eval")):
            plain = [key for key in row if key.startswith(("dpo_", "logratio_"))]
            found[stage["role"]] = {key.replace("dpo_", ""): number_of(row[key]) for key in plain}
    count = number_of(run.get("table_pairs"))
    return found, int(count) if count and count > 0 else None


def answer(run, config, loss, stages, classes):
    """The first section of a run's page: its title, words, and the charts of its picture. run: run.json;
    classes: of classes_of."""
    last = [row for stage in stages if stage["role"] == "policy" for row in stage["rows"] if row.get("eval")]
    phi = [number_of(last[-1].get(key)) for key in ("margin", "accuracy")] if last else [None]
    held_out = bool(config.get("eval_data") or config.get("eval_fraction"))
    both = "Guide (DPO) and policy (TGDPO) on the same pairs"
    return {
        "title": "Did the guidance help, and where?" if loss == "tgdpo" else f"What {NAMES[loss]} did",
        "words": words(*figures_of(run, stages), held_out, classes, phi),
        "picture": both if len(stages) > 1 else f"The {stages[-1]['role'] if stages else 'policy'} against steps",
        "charts": together([(stage["role"], stage["rows"]) for stage in stages]),
    }


def words(figures, count, held_out, cells, phi):
    """The answer as [(lead, text)]. figures, count: of figures_of; held_out: whether the pairs are; cells: classes_of;
    phi: the last evaluation's margin and accuracy by the loss's own margin, None where it is not known."""
    guide, policy = (figures.get(model, {}) for model in ("guide", "policy"))
    known = lambda *names: all(each.get(name) is not None for each in (guide, policy) for name in names)
    said, pairs = [], f"{count or 'the'} {'held-out' if held_out else 'training'} pairs"
    if known("accuracy", "margin"):
        better, noise = policy["accuracy"] - guide["accuracy"], 2 * (0.25 / count) ** 0.5 if count else 0.0
        lead = "yes." if better > noise else "no." if better < -noise else "neither way that so few can show."
        chance = f"; chance alone moves either by some {noise:.1%}" if count else ""
        text = (
            f"Of {pairs}, the policy (TGDPO) puts {policy['accuracy']:.1%} in the labelled order by the plain "
            f"DPO margin, the guide (DPO) {guide['accuracy']:.1%}{chance}. "
            f"The mean margin is {signed(policy['margin'])} against {signed(guide['margin'])}."
        )
        said.append((f"In ranking pairs, {lead}", text))
    if known("gold", "kl", "wins"):
        yes, more = policy["gold"] > guide["gold"], policy["kl"] > guide["kl"]
        text = "; ".join(
            f"{name} {signed(mine['gold'])} at KL {mine['kl']:.3g}, above the reference in {mine['wins']:.1%}"
            for name, mine in (("guide", guide), ("policy", policy))
        )
        lead = f"By the true reward, {'yes' if yes else 'no'}, at {'more' if more else 'less'} KL."
        said.append((lead, f"Known in this example alone, of sampled replies: {text}."))
    if len(cells) == 4:
        up, down, right, wrong = (len(each["pairs"]) for each in cells)
        text = (
            f"Of the {up + down + right + wrong} pairs below, the policy turned {up} right that the guide has wrong, "
            f"and {down} wrong that the guide has right; both have {right} right and {wrong} wrong."
        )
        said.append(("Where?", text))
    if known("logratio_chosen", "logratio_rejected"):
        sides = [f"{s} {signed(guide[f'logratio_{s}'])} and {signed(policy[f'logratio_{s}'])}" for s in SIDES]
        text = (
            f"Summed log π/π_ref of guide and policy: {', '.join(sides)}. What the guidance adds does "
            "not look at the label and tends to lower both responses (derive.md, D17-D19); the margin is the distance "
            "between the two."
        )
        lead = "Both responses lose likelihood." if policy["logratio_chosen"] < 0 else "The log-ratios."
        said.append((lead, text))
    if known("accuracy") and None not in phi:
        text = (
            f"{signed(phi[0])} in the mean, above 0 on {phi[1]:.1%} of the same pairs. Each token is weighed "
            "by f in it, as in none of the guide's figures: do not set it beside them."
        )
        said.append(("φ, the margin that TGDPO optimises, is another figure:", text))
    if not said and policy.get("accuracy") is not None:
        text = f"{policy['accuracy']:.1%} of {pairs} in the labelled order, mean margin {signed(policy.get('margin'))}."
        said.append(("The policy:", text))
    return said


def classes_of(pairs, guided):
    """The kinds of pairs of the token view: list of {name, mark, note, pairs: numbers}, the pairs that tell most first.
    With guide and policy: by whether the guide's summed r̂ and the policy's plain DPO margin have the labelled order.
    Without a policy yet, or without a guide, by the summed reward alone."""
    pairs = [pair for pair in pairs if pair.margin is not None]
    if guided and all(pair.dpo_margin is not None for pair in pairs):
        sums, by = {"guide": "margin", "policy": "dpo_margin"}, "the guide's summed r̂ and the policy's plain DPO margin"
        cells = [("turned right", "▲", False, True), ("turned wrong", "▼", True, False)]
        cells += [("both right", "✓", True, True), ("both wrong", "✗", False, False)]
    else:
        sums, by = {"guide" if guided else "policy": "margin"}, "its summed reward"
        cells = [("right", "✓", True), ("wrong", "✗", False)]
    classes = []
    for name, mark, *cell in cells if pairs else ():
        mine = [pair for pair in pairs if [getattr(pair, key) > 0 for key in sums.values()] == cell]
        mine.sort(key=lambda pair: -abs(getattr(pair, list(sums.values())[-1])))
        ranked = ", the ".join(f"{model} ranks them {'right' if ok else 'wrong'}" for model, ok in zip(sums, cell))
        note = f"The {ranked}, by {by}, chosen less rejected."
        classes.append({"name": name, "mark": mark, "note": note, "pairs": [pair.number for pair in mine]})
    return classes
