
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const columns = data.columns;
  const rows = columns.length ? columns[0].values.length : 0;
  const byKey = new Map(columns.map((column) => [column.key, column]));
  const find = (id) => document.getElementById(id);

  // Brushes: one for each axis, [low, high] in [0, 1], or null where all is kept.

  const axes = data.axes;
  const brushes = axes.map(() => null);
  const lines = Array.from(document.querySelectorAll(".parallel .lines path"));
  const handles = Array.from(document.querySelectorAll(".parallel .axis"));

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
    return axes.every((axis, place) => {
      const brush = brushes[place];
      if (brush === null) { return true; }
      const at = height(axis, row);
      return at !== null && at >= brush[0] - 0.002 && at <= brush[1] + 0.002;
    });
  }

  function showBrush(place) {
    const reach = handles[place].querySelector(".reach");
    const rect = handles[place].querySelector(".brush");
    const top = Number(reach.getAttribute("y"));
    const length = Number(reach.getAttribute("height"));
    const brush = brushes[place];
    if (brush === null) {
      rect.setAttribute("height", "0");
      handles[place].setAttribute("aria-valuetext", "all");
      handles[place].setAttribute("aria-valuenow", "0");
      return;
    }
    rect.setAttribute("y", String(top + (1 - brush[1]) * length));
    rect.setAttribute("height", String(Math.max(1, (brush[1] - brush[0]) * length)));
    const percent = brush.map((end) => Math.round(100 * end));
    handles[place].setAttribute("aria-valuetext", percent[0] + " to " + percent[1] + " percent of the axis");
    handles[place].setAttribute("aria-valuenow", String(Math.round((percent[0] + percent[1]) / 2)));
  }

  function brushed() {
    const isActive = brushes.some((brush) => brush !== null);
    brushes.forEach((_, place) => showBrush(place));
    kept = [];
    for (let row = 0; row < rows; row += 1) {
      if (!isActive || isKept(row)) { kept.push(row); }
    }
    const there = new Set(kept);
    lines.forEach((line) => line.classList.toggle("off", isActive && !there.has(Number(line.dataset.rank))));
    find("kept").textContent = isActive ? kept.length + " of " + rows + " trials are kept." : "All trials are kept.";
    find("release").hidden = !isActive;
    sorted();
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
      if (dragged || Math.abs(now - from) > 0.01) {
        dragged = true;
        brushes[place] = [Math.min(from, now), Math.max(from, now)];
        brushed();
      }
    });
    handle.addEventListener("pointerup", () => {
      if (from !== null && !dragged) {
        brushes[place] = null;
        brushed();
      }
      from = null;
    });
    handle.addEventListener("pointercancel", () => { from = null; });
    handle.addEventListener("keydown", (event) => {
      const brush = brushes[place];
      const step = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key];
      if (event.key === "Escape" || event.key === "Delete" || event.key === "Backspace") {
        brushes[place] = null;
      } else if (event.key === "Enter" || event.key === " " || (step && brush === null)) {
        brushes[place] = brush || [0.75, 1];
      } else if (step && event.shiftKey) {
        const middle = (brush[0] + brush[1]) / 2;
        const half = Math.max(0.02, (brush[1] - brush[0]) / 2 + step / 2);
        brushes[place] = [Math.max(0, middle - half), Math.min(1, middle + half)];
      } else if (step) {
        const move = Math.min(1 - brush[1], Math.max(-brush[0], step));
        brushes[place] = [brush[0] + move, brush[1] + move];
      } else {
        return;
      }
      event.preventDefault();
      brushed();
    });
  }

  // The table: kept rows, sorted, one page of them at a time.

  const body = document.querySelector(".trials tbody");
  const buttons = Array.from(document.querySelectorAll(".trials thead button"));
  let kept = Array.from({ length: rows }, (_, row) => row);
  let view = kept;
  let first = 0;
  let order = null; // [column, 1 or -1]; null: by rank

  function text(column, row) {
    const value = column.values[row];
    if (value === null) { return "–"; }
    if (column.levels) { return column.levels[value]; }
    return column.decimals === undefined ? String(value) : value.toFixed(column.decimals);
  }

  function sorted() {
    view = kept;
    if (order !== null) {
      const values = columns[order[0]].values;
      const sign = order[1];
      view = kept.slice().sort((a, b) => {
        if (values[a] === null || values[b] === null) {
          return (values[a] === null) - (values[b] === null) || a - b;
        }
        return sign * (values[a] - values[b]) || a - b;
      });
    }
    first = 0;
    show();
  }

  function show() {
    if (!body) { return; }
    const shown = view.slice(first, first + data.page);
    body.replaceChildren(
      ...shown.map((row) => {
        const line = document.createElement("tr");
        line.dataset.rank = String(row);
        columns.forEach((column) => {
          const cell = document.createElement("td");
          if (!column.levels) { cell.className = "number"; }
          cell.textContent = text(column, row);
          line.append(cell);
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
    const column = columns[place];
    const isSame = order !== null && order[0] === place;
    order = [place, isSame ? -order[1] : column.first || 1];
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
    find("before").addEventListener("click", () => {
      first = Math.max(0, first - data.page);
      show();
    });
    find("after").addEventListener("click", () => {
      first += data.page;
      show();
    });
    body.addEventListener("mouseover", (event) => mark(event.target.closest("tr").dataset.rank));
    body.addEventListener("mouseleave", () => mark(null));
    show();
  }

  // The code.

  const copy = find("copy");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", () => {
      const select = () => {
        getSelection().selectAllChildren(find("code"));
        find("copied").textContent = "Selected; copy it with the keyboard.";
      };
      if (!navigator.clipboard) {
        select();
        return;
      }
      navigator.clipboard.writeText(find("code").textContent).then(() => {
        find("copied").textContent = "Copied.";
      }, select);
    });
  }
})();
