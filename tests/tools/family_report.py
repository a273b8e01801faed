"""The table of families: printed for one mesh, or written for all meshes as data that the tests read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import families
import family_shares
import matrix
import transformers
from places import DATA, ROOT

# The (tp, ep) of the written table. transformers' own tensor parallelism runs on the first.
MESHES = ((2, 1), (3, 1), (4, 1), (5, 1), (2, 2))
UNPLANNED_MESHES = ((2, 1), (3, 1), (4, 1))  # of families that transformers has no plan for
_BATCH = 16  # families that are walked together: what is known after each is kept, and a stopped walk goes on there


def release() -> str:
    """Return the release of the installed transformers, as in the data's name."""
    return ".".join(transformers.__version__.split(".")[:2])


def read(version: str, table: str = "families") -> list[dict[str, Any]]:
    """Read a written table, `families` or `unplanned`: one record for each family."""
    return [json.loads(line) for line in (DATA / f"{table}-{version}.jsonl").read_text().splitlines()]


def is_exact(record: dict[str, Any]) -> bool:
    """Whether a family ran on a mesh, and computed the same as one process on all that it allows."""
    ran = [result for result in record["meshes"].values() if "refused" not in result]
    return bool(ran) and all(
        matrix.is_rounding(result.get("error", 1), result.get("rounding")) and result.get("tokens") is not False
        for result in ran
    )


@click.command()
@click.option("--tp", type=int, default=2)
@click.option("--ep", type=int, default=1)
@click.option("--upstream", is_flag=True, help="Also run transformers' own tensor parallelism.")
@click.option("--write", is_flag=True, help="Walk all meshes and write the table into tests/data.")
@click.option("--unplanned", is_flag=True, help="The families that transformers has no plan for.")
@click.option("--shares", is_flag=True, help="Instead: what every rank holds of causal models without a plan.")
@click.argument("model_types", nargs=-1)
def main(
    tp: int, ep: int, upstream: bool, write: bool, unplanned: bool, shares: bool, model_types: tuple[str, ...]
) -> None:
    """Walk the families and report how far each came."""
    if shares:
        _print_shares()
        return
    chosen = model_types or families.MODEL_TYPES
    if write:
        table, meshes = ("unplanned", UNPLANNED_MESHES) if unplanned else ("families", MESHES)
        kept, planned = ROOT / f".{table}-{release()}", not unplanned
        rows = {
            mesh: _walk_on(kept, *mesh, chosen, planned=planned, upstream=planned and mesh == MESHES[0])
            for mesh in meshes
        }
        records = _records(rows)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (DATA / f"{table}-{release()}.jsonl").write_text(lines)
        shutil.rmtree(kept)
        click.echo(f"{sum(map(is_exact, records))} of {len(records)} families are exact on every mesh")
        return
    rows = _walk(tp, ep, chosen, planned=not unplanned, upstream=upstream)
    for row in rows:
        click.echo(f"{row.family:36} {'ok' if row.ok else row.step:10} {_said(row)}")
    steps = Counter("compute what one process does" if row.ok else f"end at: {row.step}" for row in rows)
    click.echo(f"tp {tp}, ep {ep}: " + ", ".join(f"{count} {words}" for words, count in steps.most_common()))


def _print_shares() -> None:
    found = dict(family_shares.shares(record["family"] for record in read(release(), "unplanned") if record["plan"]))
    for family, share in sorted(found.items(), key=lambda item: -item[1]):
        click.echo(f"{family:36} {share:6.1%}")
    small = sum(share <= family_shares.MOST for share in found.values())
    click.echo(f"{small} of {len(found)} have at most {family_shares.MOST:.0%} of their elements on every rank")


def _walk(tp: int, ep: int, model_types: tuple[str, ...], *, planned: bool, upstream: bool) -> list[matrix.Row]:
    with tempfile.TemporaryDirectory() as folder:
        return matrix.walk(Path(folder), tp, ep, model_types, planned=planned, upstream=upstream)


def _walk_on(
    kept: Path, tp: int, ep: int, model_types: tuple[str, ...], *, planned: bool, upstream: bool
) -> list[matrix.Row]:
    """Walk batch by batch. Batches that an earlier, stopped walk has finished are read from the folder `kept`."""
    rows = []
    for first in range(0, len(model_types), _BATCH):
        batch = model_types[first : first + _BATCH]
        path = kept / f"tp{tp}-ep{ep}-{batch[0]}-{len(batch)}.json"
        if not path.exists():
            kept.mkdir(exist_ok=True)
            found = [asdict(row) for row in _walk(tp, ep, batch, planned=planned, upstream=upstream)]
            path.with_suffix(".part").write_text(json.dumps(found))
            path.with_suffix(".part").rename(path)
            click.echo(f"{path.stem}: {len(found)} families", err=True)
        rows += [matrix.Row(**row) for row in json.loads(path.read_text())]
    return rows


def _said(row: matrix.Row) -> str:
    if row.error is None:
        return row.detail
    tokens = {True: "tokens equal", False: "tokens differ", None: row.detail}[row.equal_tokens]
    theirs = f"{row.upstream:.1e}" if isinstance(row.upstream, float) else row.upstream
    return f"max rel {row.error:.1e}, {tokens}; {row.plan}: {' '.join(row.styles)}" + (
        f"; upstream {theirs}" if theirs else ""
    )


def _records(walks: dict[tuple[int, int], list[matrix.Row]]) -> list[dict[str, Any]]:
    """Return a record for each family: what it uses, how far it came on each mesh, and how far upstream came."""
    found: dict[str, dict[str, Any]] = {}
    for (tp, ep), rows in walks.items():
        for row in rows:
            record = found.setdefault(
                row.family,
                {"family": row.family, "plan": "", "styles": [], "conversions": [], "meshes": {}, "reason": ""},
            )
            record["plan"] = record["plan"] or row.plan
            record["styles"] = sorted({*record["styles"], *row.styles})
            record["conversions"] = list(row.conversions) or record["conversions"]
            if row.step in ("not built", "single"):
                record["reason"] = f"{row.step}: {row.detail}"
                continue
            mesh = f"tp{tp}" if ep == 1 else f"tp{tp} ep{ep}"
            record["meshes"][mesh] = _result(row)
            if row.upstream is not None:
                record["upstream"] = _short(row.upstream)
    return list(found.values())


def _result(row: matrix.Row) -> dict[str, Any]:
    if row.step == "refused":
        return {"refused": row.detail}
    if row.error is None:
        return {"failed": f"{row.step}: {row.detail}"}
    found: dict[str, Any] = {"error": _short(row.error)}
    found |= {} if row.equal_tokens is None else {"tokens": row.equal_tokens}
    return found | ({} if row.rounding is None else {"rounding": _short(row.rounding)})


def _short(error: float | str) -> float | str:
    return float(f"{error:.1e}") if isinstance(error, float) else error


if __name__ == "__main__":
    main()
