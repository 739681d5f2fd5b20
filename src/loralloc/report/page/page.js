"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panels = [...document.querySelectorAll(".panel")];
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const beside = document.getElementById("beside");

  const show = (panel, number, scored) => {
    const run = data[Number(panel.dataset.run)];
    const round = run.rounds[number];
    const last = run.rounds.length - 1;
    let total = 0;
    for (const cell of panel.querySelectorAll("[data-cell]")) {
      const i = Number(cell.dataset.cell);
      const rank = round.ranks[i] - (scored ? round.new[i] : 0);
      const change = rank - run.start[i];
      const far = Math.min((Math.abs(change) - 1) / Math.max(run.most - 1, 1), 1);
      const share = change === 0 ? 0 : run.weakest + (1 - run.weakest) * far;
      total += rank;
      cell.textContent = rank;
      cell.classList.toggle("lost", change < 0);
      cell.classList.toggle("gained", change > 0);
      cell.classList.toggle("same", change === 0);
      cell.classList.toggle("strong", share > 0.7);
      cell.style.setProperty("--share", share);
      const sign = change > 0 ? "+" : change < 0 ? "−" : "±";
      cell.title = `${cell.dataset.label}: ${rank} (${sign}${Math.abs(change)})`;
    }
    panel.querySelector("output").textContent = number === 0
      ? "at the start"
      : `after round ${number} of ${last}, step ${round.step}`;
    const start = run.start.reduce((a, b) => a + b, 0);
    panel.querySelector(".sum").textContent = `${start} ranks at the start, ${total} here`;
  };

  const update = (number, scored) => {
    for (const panel of panels) {
      const slider = panel.querySelector("[type=range]");
      slider.value = number;
      panel.querySelector(".scored input").checked = scored;
      show(panel, Number(slider.value), scored);
    }
  };

  for (const panel of panels) {
    const slider = panel.querySelector("[type=range]");
    const scored = panel.querySelector(".scored input");
    slider.addEventListener("input", () => update(Number(slider.value), scored.checked));
    scored.addEventListener("change", () => update(Number(slider.value), scored.checked));
    show(panel, Number(slider.value), scored.checked);
  }

  const select = (index) => {
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === index));
      tab.tabIndex = i === index ? 0 : -1;
      panels[i].hidden = !beside.checked && i !== index;
    });
    document.querySelector(".panels").classList.toggle("all", beside.checked);
  };

  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => {
      beside.checked = false;
      select(index);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) {
        const next = (index + step + tabs.length) % tabs.length;
        tabs[next].click();
        tabs[next].focus();
      }
    });
  });
  if (beside) {
    beside.addEventListener("change", () => {
      select(tabs.findIndex((tab) => tab.getAttribute("aria-selected") === "true"));
    });
  }

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();
