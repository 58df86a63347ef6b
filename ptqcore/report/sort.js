for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), column = head.cellIndex, body = head.closest("table").tBodies[0];
    const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    const compare = (a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if (!("value" in x.dataset)) return x.textContent.localeCompare(y.textContent, "en", { numeric: true });
      const [p, q] = [Number(x.dataset.value), Number(y.dataset.value)];
      return (p > q) - (p < q);
    };
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
  });
}
