"use strict";
(() => {
  const byText = new Intl.Collator(undefined, { numeric: true }).compare;

  function sort(table, head, column) {
    const downward = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.dataset.kind === "number";
    const valueOf = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [a, b] = [valueOf(one), valueOf(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // nothing stands last, either way
      const order = numeric ? Number(a) - Number(b) : byText(a, b);
      return downward ? -order : order;
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", downward ? "descending" : "ascending");
    table.tBodies[0].append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, head, column));
    });
  }

  const filters = [...document.querySelectorAll("select[data-filter]")];
  const count = document.getElementById("shown");
  function filter() {
    for (const part of document.querySelectorAll("[data-model][data-method]")) {
      part.hidden = filters.some((select) => select.value !== "" && part.dataset[select.dataset.filter] !== select.value);
    }
    const rows = [...document.querySelectorAll("#results tbody tr")];
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} runs`;
  }
  for (const select of filters) select.addEventListener("change", filter);

  const cards = [...document.querySelectorAll("details.run")];
  const all = document.getElementById("open-all");
  all.addEventListener("click", () => {
    const open = cards.some((card) => !card.hidden && !card.open);
    for (const card of cards) if (!card.hidden) card.open = open;
    all.textContent = open ? "Close all" : "Open all";
  });

  function openTarget() {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  }
  window.addEventListener("hashchange", openTarget);
  openTarget();

  for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;
  filter(); // a browser that comes back to the page may have kept a choice
})();
