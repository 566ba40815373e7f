"""results.html in a real browser, opened from disk. Set REQUIRE_BROWSER to fail without one."""

import base64
import csv
import io
import json
import os
import shutil
import time
import zlib

import numpy as np
import pytest
from fake_runs import write_run

import masks
import plot_result
import utils
from patterns import table
from report import logs, mask_grids, page, results

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BENCHMARK = utils.REPOSITORY / "experiments" / "benchmark" / "attention_cpu_auto.json"
NASTY = ("<script>alert(1)</script>", "\"quotes' & $x^2$", "注意力", "--><b>bold</b>", "`code`")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("no chromium on the PATH")
        pytest.skip("no chromium on the PATH")
    if os.environ.get("REQUIRE_BROWSER"):
        from playwright import sync_api
    else:
        sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]  # as root, without a screen
        yield playwright.chromium.launch(executable_path=path, args=arguments)


@pytest.fixture
def open_page(browser):
    """Open a file -> the page; at the end, nothing may have failed or asked for a network."""
    contexts, troubles = [], []

    def open_file(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        opened = context.new_page()
        opened.on("console", lambda message: troubles.append(message.text))
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        opened.on("dialog", lambda dialog: troubles.append(dialog.message))
        opened.on("request", lambda request: troubles.extend(_to_network(request.url)))
        opened.goto(path.resolve().as_uri())
        if options.get("java_script_enabled", True) and opened.query_selector("#controls"):
            opened.wait_for_selector("#controls:not([hidden])")
        return opened

    yield open_file
    for context in contexts:
        context.close()
    assert troubles == []


def _to_network(url):
    return [] if url.startswith(("file:", "data:", "blob:")) else [f"request to {url}"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A page of full attention and four patterns, with three seeds, on a grid of 4 x 4."""
    root = tmp_path_factory.mktemp("sweep")
    random = np.random.default_rng(0)
    for seed in range(3):
        for number, (mask_type, step) in enumerate(
            [("full", None), ("1d_cardinal", 2), ("1d_all_neighbors", 1), ("2d_cardinal", 1)]
            + [("2d_all_neighbors", 1)]
        ):
            accuracies = [40 + number, 60 + 2 * number + random.normal()]
            write_run(root, mask_type, step, seed, accuracies, images_per_second=1000 + 50 * number)
    return make_page(root, "--benchmark", str(BENCHMARK))


def make_page(root, *arguments):
    assert plot_result.main(["--results_path", str(root), *arguments]) == 0
    return root / "results.html"


def cells_of(opened, selector="#table tbody tr"):
    return [
        [cell.inner_text().strip() for cell in row.query_selector_all("th, td")]
        for row in opened.query_selector_all(selector)
    ]


def path_to_patches(path, width):
    squares = [square.split("h1v1h-1z")[0] for square in path.split("M")[1:]]
    return {int(y) * width + int(x) for x, y in (square.split() for square in squares)}


# -------------------------------------------------------------------------------------------------
# Tables


def test_the_answer_comes_first(sweep, open_page):
    opened = open_page(sweep)
    first, second, *_ = [said.inner_text() for said in opened.query_selector_all("#answer p")]
    assert first.startswith("The mean of all 3 local patterns gains")
    assert "2d_all_neighbors, step 1, the most accurate of 3 local patterns" in second
    assert opened.title() == "Local attention on Digits"
    assert opened.query_selector("main > :first-child #answer") is not None


def test_a_click_on_a_heading_sorts(sweep, open_page):
    opened = open_page(sweep)
    headings = opened.query_selector_all("#table thead th")
    column = [heading.inner_text() for heading in headings].index("images/s")

    def rates():
        return [int(cells[column].replace(",", "")) for cells in cells_of(opened)]

    button = headings[column].query_selector("button")
    button.click()
    assert rates() == sorted(rates())
    assert headings[column].get_attribute("aria-sort") == "ascending"
    button.click()
    assert rates() == sorted(rates(), reverse=True)

    # In the order of the pattern, and not of the letters; what is missing comes last.
    headings[0].query_selector("button").press("Enter")
    assert [cells[0] for cells in cells_of(opened)][:2] == ["full", "1d_cardinal, step 2"]
    difference = next(
        h for h in headings if h.inner_text().startswith("difference")
    ).query_selector("button")
    for _ in range(2):
        difference.click()
        assert {cells[6] for cells in cells_of(opened)[-2:]} == {"–"}


def test_the_csv_equals_the_table(sweep, open_page):
    opened = open_page(sweep)
    with opened.expect_download() as download:
        opened.click("text=Download as CSV")
    text = download.value.path().read_text(encoding="utf-8-sig")
    lines = list(csv.DictReader(io.StringIO(text)))
    rows = cells_of(opened)
    assert download.value.suggested_filename == "results.csv"
    assert len(lines) == len(rows) == 5

    def text_of(line):
        value = {key: float(text) for key, text in line.items() if _is_number(text)}
        half = (value["accuracy_high"] - value["accuracy_low"]) / 2
        difference = p = "–"
        if "difference_points" in value:
            bounds = f"{value['difference_low']:+.2f} to {value['difference_high']:+.2f}"
            difference = f"{value['difference_points']:+.2f} ({bounds})"
            p = f"{value['p_holm']:.3f}" if value["p_holm"] >= 0.001 else "< 0.001"
        return [
            f"{value['neighbors_nominal']:.0f}",
            f"{value['neighbors_mean']:.1f}",
            f"{100 * value['density']:.1f}",
            f"{value['attention_flops'] / 1e6:,.1f}",
            f"{value['accuracy_percent']:.2f} ± {half:.2f} (n = {line['n']})",
            difference,
            p,
            f"{value['train_images_per_second']:,.0f}",
            f"{value['train_seconds']:.0f} s",
            f"{value['peak_memory_bytes'] / 2**30:.2f}",
            line["state"],
        ]

    for line, cells in zip(lines, rows, strict=True):
        assert line["mask_type"] in cells[0]
        assert text_of(line) == cells[1:]


def _is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def test_one_mask_under_two_names_says_so(sweep, open_page):
    opened = open_page(sweep)
    names = [cells[0] for cells in cells_of(opened)]
    assert "1d_all_neighbors, step 1 (same mask as 1d_cardinal, step 2)" in names
    assert len(opened.query_selector_all("figure.mask")) == 4
    assert len(cells_of(opened, "#against-full tbody tr")) == 3


# -------------------------------------------------------------------------------------------------
# Masks


def reached_by_powers(mask, layers, with_class_token):
    """bool [N, N]: matrix powers over all tokens, the class token first."""
    num_patches = len(mask)
    tokens = np.ones((num_patches + 1, num_patches + 1), dtype=int)
    tokens[1:, 1:] = mask
    if not with_class_token:
        tokens[0] = tokens[:, 0] = 0
    return np.linalg.matrix_power(tokens, layers)[1:, 1:] > 0


def drawn(opened, index, width=4):
    """The patches of the mask number `index` that have each color."""
    figure = opened.query_selector_all("figure.mask")[index]
    return {
        kind: path_to_patches(figure.query_selector(f".{kind}").get_attribute("d"), width)
        for kind in ("neighbors", "reached", "query")
    }


@pytest.mark.parametrize("with_class_token", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_pointing_at_a_patch_shows_what_it_can_know(sweep, open_page, layers, with_class_token):
    opened = open_page(sweep)
    opened.fill("#layers", str(layers))
    opened.set_checked("#global-token", with_class_token)
    specs = [("full", None), ("1d_cardinal", 2), ("2d_cardinal", 1), ("2d_all_neighbors", 1)]

    for row, column in [(0, 0), (1, 3), (3, 2)]:
        box = opened.query_selector_all("figure.mask svg")[2].bounding_box()
        opened.query_selector("#masks").scroll_into_view_if_needed()
        box = opened.query_selector_all("figure.mask svg")[2].bounding_box()
        side = box["width"] / 4
        opened.mouse.move(box["x"] + (column + 0.5) * side, box["y"] + (row + 0.5) * side)
        patch = 4 * row + column
        for index, spec in enumerate(specs):
            mask = masks.MaskSpec(*spec).build_array(4, 4)
            mask = np.ones((16, 16), bool) if mask is None else mask
            found = drawn(opened, index)
            reached = reached_by_powers(mask, layers, with_class_token)
            assert found["query"] == {patch}
            assert found["neighbors"] == set(mask[patch].nonzero()[0])
            assert found["reached"] == set(reached[patch].nonzero()[0])


def write_grid(folder, height, width):
    config = json.loads((folder / utils.CONFIG).read_text())
    config["attention"] |= {"grid": [height, width], "num_patches": height * width}
    utils.write_json(folder / utils.CONFIG, config)


def test_rows_are_not_columns_and_queries_are_not_keys(tmp_path, open_page, monkeypatch):
    """A grid that is not square, and a pattern that looks to the right and down only."""
    pattern = masks.Pattern(
        offsets=lambda dy, dx, s: (dy >= 0) & (dy <= s) & (dx >= 0) & (dx <= 2 * s),
        num_neighbors=lambda s: (s + 1) * (2 * s + 1),
        has_1d_twin=False,
    )
    for name, mask_type in table.types_of("ahead", pattern).items():
        monkeypatch.setitem(masks.TYPES, name, mask_type)
    height, width = 3, 5
    for mask_type, step in [("full", None), ("2d_ahead", 1)]:
        write_grid(write_run(tmp_path, mask_type, step), height, width)
    opened = open_page(make_page(tmp_path))

    mask = masks.MaskSpec("2d_ahead", 1).build_array(height, width)
    svg = opened.query_selector_all("figure.mask svg")[1]
    svg.focus()
    for _ in range(5):
        opened.keyboard.press("ArrowUp")
        opened.keyboard.press("ArrowLeft")
    for layers in (1, 2):
        opened.fill("#layers", str(layers))
        opened.set_checked("#global-token", False)
        found = drawn(opened, 1, width)
        reached = masks.reachable(mask, layers)
        assert found["neighbors"] == set(mask[0].nonzero()[0]) == {0, 1, 2, 5, 6, 7}
        assert found["reached"] == set(reached[0].nonzero()[0])
    box = opened.query_selector_all("figure.mask svg")[1].bounding_box()
    assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_slider_follows_masks_that_differ_by_layer(tmp_path, open_page, layers):
    """Windows of a model of four layers, one of them global, on a grid that is not square."""
    height, width = 5, 7
    changes = {"depth": 4, "pool": "mean", "global_layers": "3"}
    for mask_type, step in [("full", None), ("2d_window", 1)]:
        write_grid(write_run(tmp_path, mask_type, step, **changes), height, width)
    opened = open_page(make_page(tmp_path))
    opened.fill("#layers", str(layers))

    spec = masks.MaskSpec("2d_window", 1, global_layers=(3,))
    of_layers = spec.build_layer_arrays(height, width, 4)
    center = (height // 2) * width + width // 2
    found = drawn(opened, 1, width)
    last = np.ones((35, 35), bool) if layers == 4 else of_layers[layers - 1]
    assert found["neighbors"] == set(last[center].nonzero()[0])
    assert found["reached"] == set(masks.reachable(of_layers, layers)[center].nonzero()[0])
    assert len(found["reached"]) == (9, 30, 35, 35)[layers - 1]


def test_the_masks_answer_to_keys_and_to_a_tap(sweep, open_page):
    opened = open_page(sweep, has_touch=True)
    svg = opened.query_selector_all("figure.mask svg")[1]
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    opened.touchscreen.tap(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    assert drawn(opened, 0)["query"] == {0}

    svg.focus()
    for key, patch in [("ArrowRight", 1), ("ArrowDown", 5), ("ArrowLeft", 4), ("ArrowLeft", 4)]:
        opened.keyboard.press(key)
        assert drawn(opened, 3)["query"] == {patch}
    assert "neighbors" in opened.inner_text("figure.mask .count")


def test_without_javascript_the_masks_and_the_tables_are_there(sweep, open_page):
    opened = open_page(sweep, java_script_enabled=False)
    assert not opened.is_visible("#controls")
    center = masks.MaskSpec("2d_cardinal", 1).build_array(4, 4)[4 * 2 + 2]
    assert drawn(opened, 2) == {
        "neighbors": set(center.nonzero()[0]),
        "reached": set(),
        "query": {10},
    }
    assert len(cells_of(opened)) == 5


def test_the_bits_of_a_mask_are_all_there():
    mask = masks.MaskSpec("1d_cardinal", 2).build_array(5, 7)
    packed = zlib.decompress(base64.b64decode(mask_grids.encode(mask)))
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=35 * 35)
    assert (bits.reshape(35, 35).astype(bool) == mask).all()


# -------------------------------------------------------------------------------------------------
# Looks


def luminance(opened, selector, what):
    color = opened.eval_on_selector(selector, f"element => getComputedStyle(element).{what}")
    return sum(int(value) for value in color[color.index("(") + 1 : -1].split(",")[:3]) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(sweep, open_page, scheme):
    opened = open_page(sweep, color_scheme=scheme)
    back = luminance(opened, "body", "backgroundColor")
    front = luminance(opened, "body", "color")
    assert (back > 200 and front < 60) if scheme == "light" else (back < 60 and front > 200)
    # Plots are black on white, in the dark as well.
    assert luminance(opened, ".paper", "backgroundColor") == 255


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(sweep, open_page, width):
    opened = open_page(sweep, viewport={"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_can_be_printed(sweep, open_page):
    opened = open_page(sweep)
    opened.emulate_media(media="print", color_scheme="dark")
    assert luminance(opened, "body", "backgroundColor") == 255
    assert not opened.is_visible("#controls")


def test_all_plots_have_titles_and_captions_with_n(sweep, open_page):
    opened = open_page(sweep)
    figures = opened.query_selector_all(".paper")
    assert len(figures) == 9, "seven of the runs, two of the benchmark"
    for figure in figures:
        caption = figure.evaluate("element => element.nextElementSibling.textContent")
        assert "n = " in caption
        assert figure.query_selector("svg").bounding_box()["height"] > 100


# -------------------------------------------------------------------------------------------------
# Unusual runs


def test_names_cannot_become_markup(tmp_path, open_page):
    for number, name in enumerate(NASTY):
        write_run(tmp_path, "2d_cardinal", 1, 0, [50 + number], run_name=name, label=NASTY[0])
    write_run(tmp_path, label=NASTY[0])
    path = make_page(tmp_path)
    opened = open_page(path)
    shown = [cells[0] for cells in cells_of(opened)]
    for name in NASTY:
        assert f"{name} (2d_cardinal, step 1)" in shown
    assert opened.query_selector("main b b, main script:not([type])") is None
    assert NASTY[0] in opened.title()
    assert opened.query_selector_all("b") != [], "of the masks' labels"
    assert all("bold" not in b.inner_text() for b in opened.query_selector_all("b"))


def test_unfinished_runs_and_missing_seeds(tmp_path, open_page):
    write_run(tmp_path, "full", None, 0)
    write_run(tmp_path, "2d_cardinal", 1, 0, [40], finished=False, epochs=3)
    write_run(tmp_path, "2d_all_neighbors", 1, 1)
    opened = open_page(make_page(tmp_path))
    assert "Cannot tell" in opened.inner_text("#answer")
    notes = opened.inner_text("#notes")
    assert "Unfinished runs" in notes
    assert "2d_cardinal_expansion_1 seed 0 (epoch 1 of 3)" in notes
    assert opened.query_selector("#against-full") is None


def test_failed_runs(tmp_path, open_page, capsys):
    """One that failed before its first epoch, and one whose file is damaged."""
    write_run(tmp_path, "full", None, 0)
    write_run(tmp_path, "2d_cardinal", 1, 0, [], finished=False, epochs=3)
    damaged = write_run(tmp_path, "2d_cardinal", 2, 0)
    (damaged / utils.SUMMARY).write_text('{"final": {"eval_acc')
    path = make_page(tmp_path)
    assert "skipped a run" in capsys.readouterr().err
    rows = {cells[0]: cells for cells in cells_of(open_page(path))}
    assert rows["2d_cardinal, step 1"][-1] == "0 of 1 done"
    assert rows["2d_cardinal, step 1"][5] == "–"
    assert "2d_cardinal, step 2" not in rows


def test_seeds_that_never_get_there(tmp_path, open_page):
    write_run(tmp_path, "full", None, 0, [50, 80], images_per_second=10)
    write_run(tmp_path, "full", None, 1, [50, 70], images_per_second=10)
    path = make_page(tmp_path, "--targets", "75", "90")
    (line,) = cells_of(open_page(path), "#speed-and-accuracy tbody tr")
    assert line == ["full", "20 s (1 of 2 seeds)", "not reached"]


def test_one_seed_only(tmp_path, open_page):
    write_run(tmp_path, "full", None, 0, [80])
    write_run(tmp_path, "2d_cardinal", 1, 0, [85])
    opened = open_page(make_page(tmp_path))
    assert "images alone" in opened.inner_text("#answer")
    assert [cells[5] for cells in cells_of(opened)] == ["80.00 (n = 1)", "85.00 (n = 1)"]


def test_runs_of_a_pattern_that_is_not_here(tmp_path, open_page):
    write_run(tmp_path, "full")
    write_run(tmp_path, "2d_of_another_checkout", 1)
    opened = open_page(make_page(tmp_path))
    assert "2d_of_another_checkout, step 1" in [cells[0] for cells in cells_of(opened)]
    assert len(opened.query_selector_all("figure.mask")) == 1


def test_a_grid_that_is_too_large_to_play_with(tmp_path, open_page):
    folder = write_run(tmp_path)
    write_grid(folder, 200, 200)
    opened = open_page(make_page(tmp_path))
    assert opened.query_selector("#masks") is None


def test_two_hundred_runs_are_a_page_of_five_megabytes_in_ten_seconds(tmp_path, open_page):
    patterns = [(kind, step) for kind in masks.STUDIED[1:] for step in range(1, 13)]
    for mask_type, step in [("full", None), *patterns]:
        for seed in range(4):
            accuracies = [30, 50 + (step or 0) + seed]
            write_run(tmp_path, mask_type, step, seed, accuracies, mean_neighbors=4.0)
    start = time.process_time()
    path = make_page(tmp_path)
    assert time.process_time() - start < 20  # ten on a quiet machine
    assert path.stat().st_size < 5 * 2**20
    opened = open_page(path)
    assert len(cells_of(opened)) == 49


# -------------------------------------------------------------------------------------------------
# What the user asks for


def test_targets_and_formats(tmp_path, open_page, capsys):
    write_run(tmp_path, "full", None, 0, [50, 80], images_per_second=10)
    path = make_page(tmp_path, "--targets", "75", "45", "--format", "pdf")
    opened = open_page(path)
    lines = cells_of(opened, "#speed-and-accuracy tbody tr")
    assert lines == [["full", "10 s", "20 s"]]
    assert (tmp_path / "figures" / "accuracy_curves.pdf").read_bytes().startswith(b"%PDF")
    assert capsys.readouterr().out.splitlines()[-1] == f"the page to read: {path}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is not a report as benchmark.py writes it"),
        ("[1]", "should hold a JSON object"),
        ('{"level": "attention", "settings": {}, "rows": []}', "has no rows"),
        ("nonsense", "cannot read"),
        (None, "No such file"),
    ],
)
def test_what_is_no_report_of_a_benchmark_is_refused(tmp_path, content, said, run_script):
    write_run(tmp_path)
    path = tmp_path / "speed.json"
    if content is not None:
        path.write_text(content)
    arguments = ["--results_path", str(tmp_path), "--benchmark", str(path)]
    code, _, err = run_script(plot_result.main, *arguments)
    assert code == 1
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "results.html").exists()


def test_targets_are_round_and_below_the_best(tmp_path):
    for step, accuracy in [(None, 61.2), (1, 78.9)]:
        write_run(tmp_path, "2d_cardinal" if step else "full", step, 0, [accuracy])
    rows = results.group_by_pattern(logs.load_runs(tmp_path))
    assert page.choose_targets(rows) == [60, 65, 70, 75]
    assert page.choose_targets(rows[:1]) == [58, 59, 60, 61]
