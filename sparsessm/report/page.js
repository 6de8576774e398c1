"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const byText = new Intl.Collator(undefined, { numeric: true }).compare;

  function sort(head) {
    const body = head.closest("table").tBodies[0];
    const downward = head.getAttribute("aria-sort") === "ascending";
    const compare = head.dataset.kind === "number" ? (a, b) => Number(a) - Number(b) : byText;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [one, other].map((row) => row.cells[head.cellIndex].dataset.value);
      if (a === "" || b === "") return (a === "") - (b === ""); // nothing stands last, either way
      return downward ? -compare(a, b) : compare(a, b);
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", downward ? "descending" : "ascending");
    body.append(...rows);
  }
  for (const button of all("th button")) button.addEventListener("click", () => sort(button.parentElement));

  const filters = all("select[data-filter]");
  function filter() {
    for (const part of all("[data-model][data-method]"))
      part.hidden = filters.some((select) => select.value !== "" && part.dataset[select.dataset.filter] !== select.value);
    const rows = all("#results tbody tr");
    document.getElementById("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} runs`;
  }
  for (const select of filters) select.addEventListener("change", filter);

  const button = document.getElementById("open-all");
  button.addEventListener("click", () => {
    const cards = all("details.run").filter((card) => !card.hidden);
    const open = cards.some((card) => !card.open);
    for (const card of cards) card.open = open;
    button.textContent = open ? "Close all" : "Open all";
  });

  function openTarget() {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (!(target instanceof HTMLDetailsElement)) return;
    target.open = true;
    target.scrollIntoView();
  }
  window.addEventListener("hashchange", openTarget);
  openTarget();

  for (const part of all("[data-script]")) part.hidden = false;
  filter(); // a browser that comes back to the page may have kept a choice
})();
