"""Make the README's pictures from a finished run: `python docs/pictures.py runs/demo` (the page needs Chromium).

Writes docs/training_curve.svg from metrics.csv, and docs/feature_page.png and docs/feature_page_dark.png as Chromium
shows features/index.html.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CURVES = {
    "losses/mse_loss": ("squared error", "#b4552d"),
    "metrics/explained_variance": ("explained variance", "#33658a"),
}
WIDTH, HEIGHT, LEFT, BOTTOM, GAP = 400, 220, 46, 34, 40


def training_curve(run: Path) -> str:
    """Draw the squared error and the explained variance over the tokens of a run, side by side."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [float(row["details/n_training_samples"]) for row in rows]
    charts = [
        chart(number * (WIDTH + GAP), name, colour, tokens, [float(row[key]) for row in rows])
        for number, (key, (name, colour)) in enumerate(CURVES.items())
    ]
    width = 2 * WIDTH + GAP + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 20}" width="{width}"'
    style = ' font-family="sans-serif" font-size="12" fill="#555"><rect width="100%" height="100%" fill="#fff"/>'
    return head + style + "".join(charts) + "</svg>\n"


def chart(x: float, name: str, colour: str, tokens: list[float], values: list[float]) -> str:
    """Draw one curve from zero to its highest value, with the value at its end."""
    top, end = max(values), max(tokens)
    right, floor = x + WIDTH, HEIGHT - BOTTOM

    def place(token: float, value: float) -> str:
        return f"{x + LEFT + (WIDTH - LEFT) * token / end:.1f},{floor - (floor - 24) * value / top:.1f}"

    last = float(place(end, values[-1]).split(",")[1])
    points = " ".join(place(token, value) for token, value in zip(tokens, values, strict=True))
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        f'<path d="M{x + LEFT} 20V{floor}H{right}" fill="none" stroke="#999"/>'
        f'<text x="{x + LEFT}" y="14" font-weight="bold" fill="{colour}">{name}</text>'
        f'<text x="{x + LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{x + LEFT - 6}" y="30" text-anchor="end">{top:.3g}</text>'
        f'<text x="{right}" y="{floor + 16}" text-anchor="end">{end / 1e6:.1f}M tokens</text>'
        f'<text x="{right}" y="{last - 6:.0f}" text-anchor="end">{values[-1]:.3g}</text>'
    )


def feature_page(run: Path, picture: Path, *, dark: bool = False) -> None:
    """Photograph the feature page."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not on the PATH: install it to photograph the feature page")
    page = (run / "features" / "index.html").resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += ["--window-size=1200,1000", "--virtual-time-budget=4000", f"--screenshot={picture}"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([chromium, *options, page], check=True, capture_output=True)


if __name__ == "__main__":
    finished = Path(sys.argv[1])
    (HERE / "training_curve.svg").write_text(training_curve(finished))
    feature_page(finished, HERE / "feature_page.png")
    feature_page(finished, HERE / "feature_page_dark.png", dark=True)
