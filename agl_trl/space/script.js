// Small things that need no server: copying, links that carry a prompt, and what Stop leaves behind.
document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("button[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  aglSay(button, "Copied");
});

function aglSay(button, text) {
  const before = button.textContent;
  button.textContent = text;
  setTimeout(() => { button.textContent = before; }, 1500);
}

// The prompt goes behind the #, which browsers never send to a server.
window.aglLink = async (prompt, temperature, seed, length, base, adapter) => {
  const url = new URL(window.location.href);
  for (const [name, value] of [["base", base], ["adapter", adapter]]) {
    if (value) url.searchParams.set(name, value); else url.searchParams.delete(name);
  }
  url.hash = new URLSearchParams({ prompt, temperature, seed, length }).toString();
  window.history.replaceState(null, "", url);
  await navigator.clipboard.writeText(url.href);
  aglSay(document.querySelector("#link"), "Link copied");
};

// What the link does not name stays as it is: a visitor may have typed already.
window.aglRestore = (prompt, temperature, seed, length, base, adapter) => {
  const query = new URLSearchParams(window.location.search);
  const hash = new URLSearchParams(window.location.hash.slice(1));
  const number = (name, fallback) => {
    const value = parseFloat(hash.get(name));
    return Number.isFinite(value) ? value : fallback;
  };
  return [
    hash.has("prompt") ? hash.get("prompt").slice(0, 4000) : prompt,
    number("temperature", temperature), number("seed", seed), number("length", length),
    (query.get("base") ?? base ?? "").slice(0, 200), (query.get("adapter") ?? adapter ?? "").slice(0, 200),
  ];
};

window.aglStopped = () => {
  for (const pane of document.querySelectorAll(".agl-pane.agl-waiting, .agl-pane.agl-writing")) {
    pane.dataset.state = "stopped";
    pane.querySelector(".agl-badge").textContent = "stopped";
  }
};
