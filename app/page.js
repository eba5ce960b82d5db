// What the page does without the server: copy, download, links, and the token panel.
(() => {
  const esc = (s) => String(s).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  // Two digits: 0.83, 0.047; what is smaller than that is told apart by its bar no more.
  const share = (p) => (p >= 0.0995 ? p.toFixed(2) : p >= 0.00095 ? Number(p.toPrecision(2)).toString() : p === 0 ? "0" : "<0.001");

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea"); // no clipboard access, e.g. in an iframe
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  function saveFile(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/markdown" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function flash(button) {
    const before = button.textContent;
    button.textContent = button.dataset.done;
    setTimeout(() => (button.textContent = before), 1500);
  }

  function bars(p, q, largest) {
    const bar = (value, kind) =>
      `<span class="bar ${kind}"><i style="width:${Math.max(0.5, (100 * value) / largest)}%"></i><em>${share(value)}</em></span>`;
    return `<td>${bar(p, "true")}</td><td>${bar(q, "flipped")}</td>`;
  }

  function choose(token) {
    const group = token.closest(".tokens");
    for (const other of group.querySelectorAll(".token")) {
      other.tabIndex = other === token ? 0 : -1;
      other.classList.toggle("chosen", other === token);
      if (other === token) other.setAttribute("aria-current", "true");
      else other.removeAttribute("aria-current");
    }
    const words = JSON.parse(group.dataset.words);
    const [p, q, reward, rejects] = JSON.parse(token.dataset.token);
    const name = token.classList.contains("end") ? words.end : token.dataset.text;
    const largest = Math.max(p, q, ...rejects.flatMap(([, a, b]) => [a, b])); // full width
    const row = (text, a, b) => `<tr><th scope="row">${esc(text)}</th>${bars(a, b, largest)}</tr>`;
    const rows = rejects.map((reject) => row(...reject)).join("");
    token.closest(".loss-view").querySelector(".token-panel").innerHTML = `
      <h4>${esc(name)}</h4><p class="faint">${esc(words.number.replace("{number}", token.dataset.place))}</p>
      <p class="reward"><b>r = ${share(reward)}</b> <span class="faint">${esc(words.tie)}</span></p>
      <table><thead><tr><td></td><th scope="col" class="true">${esc(words.true)}</th>
      <th scope="col" class="flipped">${esc(words.flipped)}</th></tr></thead>
      <tbody class="gold">${row(name, p, q)}</tbody>
      <tbody><tr><th colspan="3" class="part">${esc(words.rejects)}</th></tr>${rows}</tbody></table>`;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const actions = button.closest(".actions");
    if (actions && "copy" in button.dataset) copy(actions.dataset.text).then(() => flash(button));
    else if (actions && "download" in button.dataset)
      saveFile(button.dataset.download, `${actions.dataset.title}${actions.dataset.text}\n`);
    else if (button.classList.contains("token")) choose(button);
  });

  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.classList?.contains("token")) return;
    const all = [...event.target.closest(".tokens").querySelectorAll(".token")];
    const next = all[all.indexOf(event.target) + step];
    if (!next) return;
    event.preventDefault();
    choose(next);
    next.focus();
  });

  // A link holds the query in its fragment, which browsers do not send to servers. An article is deflated.
  async function pack(text) {
    const stream = new Blob([text]).stream().pipeThrough(new CompressionStream("deflate-raw"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    let binary = "";
    for (const byte of bytes) binary += String.fromCharCode(byte);
    return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  }

  async function unpack(packed, limit) {
    const bytes = Uint8Array.from(atob(packed.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
    const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw")).getReader();
    const decoder = new TextDecoder();
    let text = "";
    while (text.length <= limit) {
      const { done, value } = await reader.read();
      if (done) return text + decoder.decode();
      text += decoder.decode(value, { stream: true });
    }
    return text.slice(0, limit + 1); // longer than the limit: the server says so
  }

  // ---- what changes on the page by itself

  // The document's language follows the heading's, which follows the choice of language.
  const followLanguage = () => {
    const lang = document.querySelector("#title h1")?.lang;
    if (lang && document.documentElement.lang !== lang) document.documentElement.lang = lang;
  };

  // Outlines that begin below the screen are brought into view once, for whoever has just asked for them.
  let awaited = null; // id of the board whose outlines were asked for
  const RUNS = { run: "board", "styles-run": "styles-board" };
  const scrollToOutlines = () => {
    const board = awaited && document.getElementById(awaited)?.querySelector('.board[aria-busy="true"]');
    if (!board) return;
    awaited = null;
    if (board.getBoundingClientRect().top < innerHeight * 0.6) return;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    board.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
  };
  document.addEventListener("click", (event) => {
    const id = event.target.closest("button")?.id;
    if (id in RUNS) awaited = RUNS[id];
  });
  const look = () => (followLanguage(), scrollToOutlines());
  const options = { childList: true, subtree: true, attributes: true, attributeFilter: ["lang", "aria-busy"] };
  document.addEventListener("DOMContentLoaded", () => new MutationObserver(look).observe(document.body, options));

  window.tkpo = {
    async link(topic, article, style, language, temperature, seed, length, strength, methods) {
      const fragment = new URLSearchParams({ topic, style, language, temperature, seed, length, strength });
      fragment.set("methods", methods.join(" "));
      if (article) fragment.set("article", await pack(article));
      const url = `${location.origin}${location.pathname}${location.search}#${fragment}`;
      await copy(url);
      history.replaceState(null, "", url);
      const button = document.querySelector("#link button, button#link");
      if (button) {
        button.dataset.done = document.querySelector("[data-link-done]").dataset.linkDone;
        flash(button);
      }
    },

    // What a link says becomes the fields' values; the others stay as they are, also while somebody types.
    // known: what the server takes.
    async read(known) {
      const fragment = new URLSearchParams(location.hash.slice(1));
      const same = { __type__: "update" };
      const number = (key, low, high) => {
        const value = Number(fragment.get(key));
        return fragment.has(key) && value >= low && value <= high ? value : same;
      };
      const oneOf = (key, other = same) => (known[key].includes(fragment.get(key)) ? fragment.get(key) : other);
      let article = fragment.has("topic") ? "" : same; // a link without an article means none, whatever is shown
      if (fragment.has("article")) article = await unpack(fragment.get("article"), known.article).catch(() => same);
      const methods = (fragment.get("methods") ?? "").split(" ").filter((method) => known.methods.includes(method));
      const own = navigator.language.toLowerCase().startsWith("zh") ? "zh" : same;
      return [
        fragment.get("topic") ?? same, article, oneOf("style"), oneOf("language"),
        number("temperature", 0, 2), number("seed", 0, 2147483647), number("length", 8, 384),
        number("strength", 0, known.strength), methods.length ? methods : same, oneOf("ui", own),
      ];
    },
  };
})();
