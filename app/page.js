// What the page does without the server: copy, download, links, and the token panel.
(() => {
  const esc = (s) => String(s).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const share = (p) => (p >= 0.0995 ? p.toFixed(2) : p >= 0.00095 ? p.toFixed(3) : p === 0 ? "0" : p.toExponential(0));

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
    else if (actions && "inspect" in button.dataset) document.querySelector(`#inspect-${button.dataset.inspect}`)?.click();
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

  window.tkpo = {
    async link(topic, article, style, language, temperature, seed, length) {
      const fragment = new URLSearchParams({ topic, style, language, temperature, seed, length });
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

    async read(topic, article, style, language, temperature, seed, length, ui, styles, languages, articleLimit) {
      const fragment = new URLSearchParams(location.hash.slice(1));
      const number = (key, low, high, now) => {
        const value = Number(fragment.get(key));
        return fragment.has(key) && value >= low && value <= high ? value : now;
      };
      const oneOf = (key, known, now) => (known.includes(fragment.get(key)) ? fragment.get(key) : now);
      if (fragment.has("article")) article = await unpack(fragment.get("article"), articleLimit).catch(() => article);
      if (navigator.language.toLowerCase().startsWith("zh")) ui = "zh";
      return [
        fragment.get("topic") ?? topic, article, oneOf("style", styles, style), oneOf("language", languages, language),
        number("temperature", 0, 2, temperature), number("seed", 0, 2147483647, seed),
        number("length", 8, 384, length), oneOf("ui", ["en", "zh"], ui),
      ];
    },
  };
})();
