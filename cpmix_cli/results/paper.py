"""Tables of CP-Mix's paper, with the numbers as printed. Imports nothing heavy.

Source: Yoon et al., Mix from Failure: Confusion-Pairing Mixup for Long-Tailed Recognition, arXiv 2024: Tables 1 to 4,
and 7 to 9 of the appendix. Tables 5 and 6 are settings, which are in the recipes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    header: str
    """Heading as printed; in Table 1 with a short name of the data set."""
    data: str
    """Name of the data set, as build-lt gives it."""
    measure: str = "top1"
    """Key of an evaluation's metrics.json, in per cent."""

    @property
    def family(self) -> str:
        """Folder of the recipes for the data set: cifar100-lt of cifar100-lt-rho200."""
        return self.data.partition("-rho")[0]


@dataclass(frozen=True)
class PaperRow:
    """A row of a table: a method and its numbers."""

    name: str
    """Name as printed; for an ablation, the ticked components."""
    recipe: str
    """Last part of the names of its recipes, such as cpmix."""
    printed: str
    """Numbers as printed in the order of the columns; - for an empty cell."""
    finetuned: bool = False
    """Whether the numbers are after the recipe's finetune, as for CP-Mix and MiSLAS. Recipes of other methods have a
    finetune for fair comparison, and the row is the result before it."""
    copied: bool = False
    """Whether the paper copied the row from other papers: no dagger, and not CP-Mix."""
    note: str = ""
    """Remark on the numbers."""

    @property
    def cells(self) -> list[str | None]:
        """Numbers as printed, one per column; None for an empty cell."""
        return [None if cell == "-" else cell for cell in self.printed.split()]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]
    note: str = ""
    few_inclusive: bool = False
    """Whether classes with exactly 20 training images count as few."""


COPIED = "copied there from other papers: other epochs, best epoch on the test set, for OTmix its confusions too"
"""Note why copied rows are not comparable."""
OWN_BEST = "the best epoch on the test set"
OTMIX = "confusions of the test set, and the best epoch on it"
THREE = "three experts; CP-Mix + RIDE has six"
FOUR = "marked as reproduced, but these are the published numbers of four experts with distillation"
REMIX = "mixes variants: on CIFAR-100-LT it looks like Remix, on CIFAR-10-LT like Remix-DRW"
UNIMIX = "its released settings are not those of its paper"
OLDER = "marked as reproduced, but CIFAR at rho 200 and 100 equals older publications to the last digit"
GROUPS = ("Many", "Medium", "Few")


def _by_group(data: str) -> tuple[Column, ...]:
    return (*(Column(name, data, name.lower()) for name in GROUPS), Column("All", data))


def _ablation(printed: str) -> tuple[PaperRow, ...]:
    """Make the rows of Table 3 or 4, which have the same ticks."""
    ticks = [
        *("CE", "BS", "BS + L_mix, lambda", "BS + L_mix, Eq. 9", "BS + L_CP, lambda", "BS + L_CP + L_mix, lambda"),
        *("BS + L_CP, Eq. 9", "BS + L_CP + L_mix, Eq. 9", "the same + finetune"),
    ]
    numbered = enumerate(zip(ticks, printed.split(), strict=True), start=1)
    return tuple(PaperRow(name, f"ablation-{n}", cell, finetuned=n == len(ticks)) for n, (name, cell) in numbered)


TICKS = "the ticks of rows 5 and 6 are lost in our copy of the paper; read as without and with L_mix"

PAPER_TABLES: dict[str, PaperTable] = {
    "table1": PaperTable(
        "Table 1: top-1 accuracy on CIFAR100-LT (C100) and CIFAR10-LT (C10) by rho",
        tuple(Column(f"C{n} {rho}", f"cifar{n}-lt-rho{rho}") for n in (100, 10) for rho in (200, 100, 50, 10)),
        (
            PaperRow("Cross Entropy", "cross-entropy", "34.84 38.32 43.26 57.00 65.68 70.36 77.10 86.89", note=OLDER),
            PaperRow("LDAM-DRW", "ldam-drw", "39.03 43.64 47.31 56.90 76.14 79.58 82.96 87.48"),
            PaperRow("Balanced Softmax", "balanced-softmax", "38.01 42.71 46.68 58.34 74.48 77.20 81.26 87.46"),
            PaperRow("MiSLAS", "mislas", "- 47.0 52.3 63.2 - 82.1 85.7 90.0", True, True, OWN_BEST),
            PaperRow("Remix", "remix", "36.99 41.94 46.21 59.36 - 79.76 - 89.02", False, True, REMIX),
            PaperRow("CMO", "cmo", "- 43.9 48.3 59.5 - - - -", False, True, OWN_BEST),
            PaperRow("UniMix", "unimix", "42.07 45.45 51.11 61.25 78.48 82.75 84.32 89.66", False, True, UNIMIX),
            PaperRow("OTmix (BS)", "otmix", "- 46.8 52.3 62.3 - 84.0 86.5 90.2", False, True, OTMIX),
            PaperRow("ACE", "ace", "- 49.6 51.9 - - 81.4 84.9 -", False, True, "of ACE's own code"),
            PaperRow("RIDE", "ride", "46.34 49.83 52.73 59.30 79.16 82.31 84.61 87.19"),
            PaperRow("CMO+RIDE", "cmo-ride", "- 50.0 53.0 60.2 - - - -", False, True, THREE),
            PaperRow("SADE", "sade", "- 49.8 53.9 63.6 - - - -", False, True, f"images turned, {OWN_BEST}"),
            PaperRow("OTMix+RIDE", "otmix-ride", "- 50.7 53.8 60.8 - 82.7 85.2 88.7", False, True, f"{THREE}; {OTMIX}"),
            PaperRow("CP-Mix", "cpmix", "43.56 48.20 52.12 61.91 78.34 82.44 85.08 89.87", True),
            PaperRow("CP-Mix + RIDE", "cpmix-ride", "47.37 51.40 55.77 62.17 79.67 81.56 84.23 86.70"),
        ),
    ),
    "table2": PaperTable(
        "Table 2: top-1 accuracy on large data sets",
        (
            Column("ImageNet-LT", "imagenet-lt"),
            Column("Places-LT", "places-lt"),
            Column("iNaturalist 2018", "inaturalist2018"),
        ),
        (
            PaperRow("Cross Entropy", "cross-entropy", "45.5 32.3 64.5"),
            PaperRow("Balanced Softmax", "balanced-softmax", "50.6 39.3 69.9"),
            PaperRow("LADE", "lade", "- 39.2 69.3", False, True, "not the figures of LADE's own paper"),
            PaperRow("LDAM-DRW", "ldam-drw", "50.3 - 66.9"),
            PaperRow("MiSLAS", "mislas", "52.7 40.4 71.6", True, True, OWN_BEST),
            PaperRow("Remix", "remix", "48.6 - 70.5", False, True),
            PaperRow("UniMix", "unimix", "48.6 - 70.5", False, True, "the row repeats that of Remix"),
            PaperRow("OTmix (BS)", "otmix", "55.6 - 71.5", False, True, OTMIX),
            PaperRow("ACE", "ace", "54.7 - 72.9", False, True, "of ACE's own code"),
            PaperRow("RIDE", "ride", "55.4 40.3 72.6", note=FOUR),
            PaperRow("CMO+RIDE", "cmo-ride", "56.2 - 72.8", False, True),
            PaperRow("SADE", "sade", "- 40.9 72.9", False, True),
            PaperRow("OTmix+RIDE", "otmix-ride", "57.3 - 73.0", False, True, OTMIX),
            PaperRow("CP-Mix", "cpmix", "53.9 42.3 72.3", True),
            PaperRow("CP-Mix+RIDE", "cpmix-ride", "56.6 - 73.7"),
        ),
    ),
    "table3": PaperTable(
        "Table 3: ablation on CIFAR100-LT at rho 200",
        (Column("Top-1 accuracy", "cifar100-lt-rho200"),),
        _ablation("34.84 38.01 36.48 37.21 41.28 41.26 40.26 42.77 43.56"),
        TICKS,
    ),
    "table4": PaperTable(
        "Table 4: ablation on ImageNet-LT",
        (Column("Top-1 accuracy", "imagenet-lt"),),
        _ablation("45.5 50.6 46.8 48.9 51.8 51.9 52.3 52.9 53.9"),
        TICKS,
    ),
    "table7": PaperTable(
        "Table 7: accuracy on ImageNet-LT by group",
        _by_group("imagenet-lt"),
        (
            PaperRow("Cross Entropy", "cross-entropy", "65.9 37.6 9.1 44.6"),
            PaperRow("LDAM-DRW", "ldam-drw", "62.1 46.4 30.1 50.3"),
            PaperRow("Balanced Softmax", "balanced-softmax", "61.6 48.1 30.3 50.9"),
            PaperRow("MiSLAS", "mislas", "61.7 51.3 35.8 52.7", True, True, "by groups of its own"),
            PaperRow("CP-Mix", "cpmix", "59.3 53.5 39.7 53.9", True),
        ),
        "Cross Entropy and Balanced Softmax have other numbers in Table 2: other runs",
    ),
    "table8": PaperTable(
        "Table 8: accuracy on Places-LT by group",
        _by_group("places-lt"),
        (
            PaperRow("Cross Entropy", "cross-entropy", "46.7 28.5 15.5 32.3"),
            PaperRow("Balanced Softmax", "balanced-softmax", "43.2 40.2 31.1 39.3"),
            PaperRow("MiSLAS", "mislas", "39.6 43.3 36.1 40.4", True, True),
            PaperRow("CP-Mix", "cpmix", "45.4 42.7 36.1 42.3", True),
        ),
        "its groups are those of evaluate --few-inclusive: classes of exactly 20 images are few",
        few_inclusive=True,
    ),
    "table9": PaperTable(
        "Table 9: accuracy on iNaturalist 2018 by group",
        _by_group("inaturalist2018"),
        (
            PaperRow("Cross Entropy", "cross-entropy", "76.4 66.4 59.1 64.5"),
            PaperRow("LDAM-DRW", "ldam-drw", "68.3 67.3 66.4 66.9"),
            PaperRow("Balanced Softmax", "balanced-softmax", "68.8 70.3 69.7 69.9"),
            PaperRow("CP-Mix", "cpmix", "57.9 72.9 75.3 72.3", True),
        ),
    ),
}
