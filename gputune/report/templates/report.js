
"use strict";
(function () {
  const { columns, axes, page } = JSON.parse(document.getElementById("data").textContent);
  const rows = columns.length ? columns[0].values.length : 0;
  const byKey = new Map(columns.map((column) => [column.key, column]));
  const find = (id) => document.getElementById(id);
  const all = (selector) => Array.from(document.querySelectorAll(selector));

  // Brushes: one for each axis, [low, high] in [0, 1], or null where all is kept.

  const brushes = axes.map(() => null);
  const lines = all(".parallel [data-rank]");
  const handles = all(".parallel .axis");

  function height(axis, row) {
    if (axis.heights) { return axis.heights[row] === null ? null : axis.heights[row] / 1000; }
    const value = byKey.get(axis.column).values[row];
    if (value === null || (axis.log && value <= 0)) { return null; }
    const place = axis.log
      ? Math.log(value / axis.low) / Math.log(axis.high / axis.low)
      : (value - axis.low) / (axis.high - axis.low);
    return Math.min(1, Math.max(0, place));
  }

  function isKept(row) {
    return brushes.every((brush, place) => {
      const at = brush && height(axes[place], row);
      return brush === null || (at !== null && at >= brush[0] - 0.002 && at <= brush[1] + 0.002);
    });
  }

  function showBrush(brush, place) {
    const [reach, rect] = [".reach", ".brush"].map((part) => handles[place].querySelector(part));
    const [top, length] = ["y", "height"].map((name) => Number(reach.getAttribute(name)));
    const [low, high] = brush || [0, 0];
    rect.setAttribute("y", String(top + (1 - high) * length));
    rect.setAttribute("height", String(brush ? Math.max(1, (high - low) * length) : 0));
    const [from, to] = [low, high].map((end) => Math.round(100 * end));
    handles[place].setAttribute("aria-valuetext", brush ? from + " to " + to + " percent of the axis" : "all");
    handles[place].setAttribute("aria-valuenow", String(Math.round((from + to) / 2)));
  }

  function brushed() {
    const isActive = brushes.some((brush) => brush !== null);
    brushes.forEach(showBrush);
    kept = everyRow.filter(isKept);
    const there = new Set(kept);
    lines.forEach((line) => line.classList.toggle("off", isActive && !there.has(Number(line.dataset.rank))));
    find("kept").textContent = isActive ? kept.length + " of " + rows + " trials are kept." : "All trials are kept.";
    find("release").hidden = !isActive;
    sorted();
  }

  function setBrush(place, brush) {
    brushes[place] = brush;
    brushed();
  }

  function listen(handle, place) {
    let from = null;
    let dragged = false;
    const at = (event) => {
      const box = handle.querySelector(".reach").getBoundingClientRect();
      return Math.min(1, Math.max(0, 1 - (event.clientY - box.top) / box.height));
    };
    handle.addEventListener("pointerdown", (event) => {
      from = at(event);
      dragged = false;
      handle.setPointerCapture(event.pointerId);
      handle.focus({ preventScroll: true });
      event.preventDefault();
    });
    handle.addEventListener("pointermove", (event) => {
      if (from === null) { return; }
      const now = at(event);
      dragged = dragged || Math.abs(now - from) > 0.01;
      if (dragged) { setBrush(place, [Math.min(from, now), Math.max(from, now)]); }
    });
    handle.addEventListener("pointerup", () => {
      if (from !== null && !dragged) { setBrush(place, null); }
      from = null;
    });
    handle.addEventListener("pointercancel", () => { from = null; });
    handle.addEventListener("keydown", (event) => {
      const brush = brushes[place];
      const step = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key];
      let next = null;
      if (event.key === "Enter" || event.key === " " || (step && brush === null)) {
        next = brush || [0.75, 1];
      } else if (step && event.shiftKey) {
        const middle = (brush[0] + brush[1]) / 2;
        const half = Math.max(0.02, (brush[1] - brush[0]) / 2 + step / 2);
        next = [Math.max(0, middle - half), Math.min(1, middle + half)];
      } else if (step) {
        const move = Math.min(1 - brush[1], Math.max(-brush[0], step));
        next = [brush[0] + move, brush[1] + move];
      } else if (!["Escape", "Delete", "Backspace"].includes(event.key)) {
        return;
      }
      event.preventDefault();
      setBrush(place, next);
    });
  }

  // The table: kept rows, sorted, one page of them at a time.

  const body = document.querySelector(".trials tbody");
  const buttons = all(".trials thead button");
  const everyRow = Array.from({ length: rows }, (_, row) => row);
  let kept = everyRow;
  let view = kept;
  let first = 0;
  let order = null; // [column, 1 or -1]; null: by rank

  function text(column, row) {
    const value = column.values[row];
    if (value === null) { return "–"; }
    if (column.levels) { return column.levels[value]; }
    return column.decimals === undefined ? number(value) : limited(value, column.decimals);
  }

  // At most four significant digits, as limited in scores.py writes the first rows.
  function limited(value, decimals) {
    const text = value.toFixed(decimals);
    const digits = text.replace(/[-.]/g, "").replace(/^0+/, "");
    return decimals > 0 && digits.length > 4 ? limited(value, decimals - 1) : text;
  }

  // As plain_number in page.py writes the first rows.
  function number(value) {
    const size = Math.abs(value);
    const isPlain = value === 0 || Number.isInteger(value) || (size >= 1e-4 && size < 1e6);
    return isPlain ? String(value) : value.toExponential();
  }

  function sorted() {
    view = kept;
    if (order !== null) {
      const [place, sign] = order;
      const values = columns[place].values;
      const isAbsent = (row) => values[row] === null;
      view = kept.slice().sort((a, b) => isAbsent(a) - isAbsent(b) || sign * (values[a] - values[b]) || a - b);
    }
    show(0);
  }

  function show(from) {
    if (!body) { return; }
    first = from;
    const shown = view.slice(first, first + page);
    body.replaceChildren(
      ...shown.map((row) => {
        const line = document.createElement("tr");
        line.dataset.rank = String(row);
        columns.forEach((column) => {
          const cell = line.insertCell();
          if (!column.levels) { cell.className = "number"; }
          cell.textContent = text(column, row);
        });
        return line;
      })
    );
    const last = first + shown.length;
    find("place").textContent = shown.length ? first + 1 + " to " + last + " of " + view.length : "no trial";
    find("before").disabled = first === 0;
    find("after").disabled = last >= view.length;
  }

  function sortBy(place) {
    const isSame = order !== null && order[0] === place;
    order = [place, isSame ? -order[1] : columns[place].first || 1];
    buttons.forEach((button) => button.closest("th").removeAttribute("aria-sort"));
    buttons[place].closest("th").setAttribute("aria-sort", order[1] === 1 ? "ascending" : "descending");
    sorted();
  }

  function mark(row) {
    lines.forEach((line) => line.classList.toggle("shown", line.dataset.rank === row));
  }

  handles.forEach(listen);
  buttons.forEach((button, place) => button.addEventListener("click", () => sortBy(place)));
  if (find("release")) {
    find("release").addEventListener("click", () => {
      brushes.fill(null);
      brushed();
    });
  }
  if (body) {
    find("before").addEventListener("click", () => show(Math.max(0, first - page)));
    find("after").addEventListener("click", () => show(first + page));
    body.addEventListener("mouseover", (event) => mark(event.target.closest("tr").dataset.rank));
    body.addEventListener("mouseleave", () => mark(null));
    show(0);
  }

  // Charts and tables that are wider than the window say that they scroll.

  function showHints() {
    all(".hint").forEach((hint) => {
      const frame = hint.parentElement.querySelector(".frame");
      hint.hidden = frame.scrollWidth <= frame.clientWidth + 1;
    });
  }

  addEventListener("resize", showHints);
  showHints();

  // The code.

  const copy = find("copy");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", () => {
      const code = find("code");
      const select = () => {
        getSelection().selectAllChildren(code);
        find("copied").textContent = "Selected; copy it with the keyboard.";
      };
      const copied = () => { find("copied").textContent = "Copied."; };
      if (navigator.clipboard) {
        navigator.clipboard.writeText(code.textContent).then(copied, select);
      } else {
        select();
      }
    });
  }
})();
