"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const grid = data.what_if;
  const surfaces = grid.surfaces;
  const GIB = 2 ** 30;
  const DASHES = ["solid", "dashed", "dotted", [8, 3, 2, 3], [2, 3], [12, 4]];
  const SYMBOLS = ["circle", "diamond", "triangle", "rect", "emptyCircle", "emptyDiamond"];
  const MAP_GAIN = 0.02;
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const count = (value) => value.toLocaleString("en-US");
  const people = (value) => `${count(value)} ${value === 1 ? "user" : "users"}`;
  const gib = (bytes) => `${(bytes / GIB).toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })} GiB`;
  const MIB = 2 ** 20;
  const size = (bytes) => Math.abs(bytes) >= GIB / 100 || bytes === 0 ? gib(bytes) : `${(bytes / MIB).toFixed(2)} MiB`;
  const short = (tokens) => tokens === 0 ? "0" : tokens % 1048576 === 0 ? `${tokens / 1048576}M` : tokens % 1024 === 0 ? `${tokens / 1024}k` : count(tokens);

  const rate = (value) => value >= 99.95 ? count(Math.round(value)) : value.toPrecision(3);

  function seconds(value) {
    for (const [unit, name] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
      if (value >= unit * 0.9995 || name === "µs") {
        const scaled = value / unit;
        return `${rate(scaled)} ${name}`;
      }
    }
    return "";
  }

  // ------------------------------------------------------------------ what if

  const state = {
    users: Math.max(0, grid.users.indexOf(data.chosen.num_users)),
    context: Math.max(0, grid.contexts_tokens.indexOf(data.chosen.context_tokens)),
    surface: Math.max(0, surfaces.findIndex((s) => s.kv_cache_dtype === data.chosen.kv_cache_dtype)),
  };

  function put(id, value, sub, state_) {
    byId(id).textContent = value;
    byId(id).className = state_ || "";
    byId(`${id}-sub`).textContent = sub;
  }

  let speaking = 0;
  function answer() {
    const users = grid.users[state.users];
    const context = grid.contexts_tokens[state.context];
    const surface = surfaces[state.surface];
    byId("users-value").textContent = count(users);
    byId("users").setAttribute("aria-valuetext", people(users));
    byId("context-value").textContent = `${count(context)} tokens`;
    byId("context").setAttribute("aria-valuetext", `${count(context)} tokens`);
    if (!surface) return;
    const most = surface.max_users[state.context];
    const longest = surface.limit_context_tokens[state.users];
    const fits = users <= most;
    const needed = surface.bytes_per_request[state.context] * Math.ceil(users / grid.num_replicas);
    put("w-fits", fits ? "✓ yes" : "✕ no",
      `${people(most)} at most; ${longest ? `${count(longest)} tokens for ${people(users)}` : "no context for so many"}`,
      fits ? "yes-word" : "no-word");
    put("w-kv", gib(needed), `of ${gib(grid.kv_cache_bytes)}`);
    const at = (name) => surface[name] && fits ? surface[name][state.users][state.context] : null;
    const known = surface.itl_s !== null;
    const none = known ? "does not fit" : "unknown";
    const itl = at("itl_s"), tpot = at("tpot_s"), ttft = at("ttft_s");
    put("w-itl", itl === null ? "–" : seconds(itl), itl === null ? none : `80%: ${seconds(at("itl_low_s"))} to ${seconds(at("itl_high_s"))}`);
    put("w-tpot", tpot === null ? "–" : seconds(tpot), tpot === null ? none : `${rate(1 / tpot)} tokens/s a user`);
    put("w-ttft", ttft === null ? "–" : seconds(ttft), ttft === null ? none : "each user asks again when answered");
    put("w-rate", tpot === null ? "–" : `${rate(users / tpot / grid.num_gpus)} tok/s`, tpot === null ? none : "output tokens, under load");
    clearTimeout(speaking);
    speaking = setTimeout(() => {
      byId("w-live").textContent = `${people(users)} at ${count(context)} tokens with ${surface.kv_cache_dtype}: `
        + (fits ? `fits${itl === null ? "" : `, a token every ${seconds(itl)}`}` : `does not fit, ${people(most)} would`);
    }, 300);
  }

  function drawMap() {
    const table = byId("map");
    if (!table) return;
    const base = surfaces.find((s) => data.map.baseline === s.kv_cache_dtype);
    const chosen = surfaces[state.surface];
    const small = chosen === base ? surfaces.find((s) => s.kv_cache_dtype === data.map.kv_cache_dtype) : chosen;
    if (!base || !small || !small.itl_s || !base.itl_s) return;
    byId("map-name").textContent = small.kv_cache_dtype;
    [...table.tBodies[0].rows].forEach((row, r) => {
      [...row.cells].slice(1).forEach((cell, c) => {
        const i = grid.users.indexOf(data.map.users[r]), j = grid.contexts_tokens.indexOf(data.map.contexts_tokens[c]);
        const fitsBase = grid.users[i] <= base.max_users[j], fitsSmall = grid.users[i] <= small.max_users[j];
        delete cell.dataset.level;
        if (!fitsBase || !fitsSmall) {
          cell.className = fitsSmall ? "only" : "none";
          cell.textContent = fitsSmall ? "only" : "–";
          return;
        }
        const saving = 1 - small.itl_s[i][j] / base.itl_s[i][j];
        cell.className = saving >= MAP_GAIN ? "saves" : saving <= -MAP_GAIN ? "costs" : "even";
        if (saving >= MAP_GAIN) cell.dataset.level = String(Math.min(Math.floor(saving * 10), 4));
        cell.textContent = `${Math.round(saving * 100)}%`;
      });
    });
  }

  // ------------------------------------------------------------------ pictures

  const charts = {};
  let printing = false;

  function chart(id) {
    const element = byId(id);
    if (!element) return null;
    if (!charts[id]) charts[id] = echarts.init(element, null, { renderer: "svg" });
    return charts[id];
  }

  const narrow = () => !printing && window.innerWidth < 640;

  function tip(title, lines) {
    const box = document.createElement("div");
    const head = document.createElement("b");
    head.textContent = title;
    box.append(head);
    for (const line of lines) {
      const row = document.createElement("div");
      row.textContent = line;
      box.append(row);
    }
    return box;
  }

  function common() {
    const ink = colour("--ink"), soft = colour("--soft"), line = colour("--line");
    return {
      ink, soft, line,
      base: {
        animation: false,
        backgroundColor: "transparent",
        textStyle: { color: ink, fontFamily: "system-ui, sans-serif", fontSize: 12 },
        tooltip: { trigger: "axis", confine: true, backgroundColor: colour("--paper"), borderColor: line, textStyle: { color: ink, fontSize: 12 } },
        legend: { top: 0, left: 0, itemWidth: 34, textStyle: { color: ink } },
      },
      axis: { nameTextStyle: { color: soft }, axisLabel: { color: soft, hideOverlap: true }, axisLine: { lineStyle: { color: soft } }, splitLine: { lineStyle: { color: line } } },
    };
  }

  function drawMemory() {
    const target = chart("chart-memory");
    if (!target) return;
    const { base, axis, ink, line } = common();
    const names = [], offsets = [], sizes = [], colours = [];
    let reached = 0;
    for (const s of data.memory) {
      names.push(s.label);
      offsets.push(Math.min(reached, reached + s.bytes));
      sizes.push(Math.abs(s.bytes));
      colours.push(colour(`--${s.kind}`));
      reached += s.bytes;
    }
    const parts = [...data.memory, { label: "GPU memory", bytes: reached, source: "exact", detail: "all of the above" }];
    names.push("GPU memory");
    offsets.push(0);
    sizes.push(reached);
    colours.push(colour("--soft"));
    const widest = Math.max(...sizes.map((v, k) => v + offsets[k]));
    target.setOption({
      ...base,
      grid: { left: narrow() ? 112 : 190, right: 84, top: 8, bottom: 44 },
      tooltip: { ...base.tooltip, formatter: (items) => {
        const part = parts[items[0].dataIndex];
        return tip(part.label, [size(part.bytes), `${part.source || "unknown"}: ${part.detail}`.slice(0, 120)]);
      } },
      xAxis: { ...axis, type: "value", min: 0, max: widest, interval: step(widest / GIB) * GIB, axisLabel: { ...axis.axisLabel, showMaxLabel: false, formatter: (v) => `${Math.round(v / GIB)}` }, name: "GiB", nameLocation: "middle", nameGap: 26 },
      yAxis: { ...axis, type: "category", inverse: true, data: names, axisTick: { show: false }, splitLine: { show: false }, axisLabel: { color: ink, width: narrow() ? 104 : 180, overflow: "break", lineHeight: 13, fontSize: narrow() ? 11 : 12, interval: 0 } },
      series: [
        { type: "bar", stack: "m", silent: true, itemStyle: { color: "transparent" }, data: offsets },
        { type: "bar", stack: "m", barCategoryGap: "28%", data: sizes.map((v, i) => ({ value: v, itemStyle: { color: colours[i], borderColor: line } })),
          label: { show: true, position: "right", color: ink, formatter: (item) => size(parts[item.dataIndex].bytes) } },
      ],
    }, true);
  }

  function step(range) {
    const raw = range / (narrow() ? 3 : 6);
    const power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((m) => m * power).find((v) => v >= raw);
  }

  function legendHeight(target, names) {
    const wide = names.reduce((sum, name) => sum + name.length * 7 + 56, 0);
    return 22 * Math.ceil(wide / target.getWidth());
  }

  function mark(value, text, key) {
    const { soft, ink } = common();
    return { silent: true, symbol: "none", lineStyle: { color: soft, type: "dotted", width: 1.5 }, label: { color: ink, formatter: text, position: key === "xAxis" ? "insideEndTop" : "insideStartTop" }, data: [{ [key]: value }] };
  }

  function drawCapacity() {
    const some = surfaces.some((s) => s.max_users.some((v) => v > 0));
    byId("capacity-empty").hidden = some;
    byId("chart-capacity").hidden = !some;
    const target = some ? chart("chart-capacity") : null;
    if (!target) return;
    const { base, axis } = common();
    const series = surfaces.map((s, i) => ({
      name: s.kv_cache_dtype, type: "line", symbol: SYMBOLS[i % SYMBOLS.length], symbolSize: 7,
      color: colour(`--s${i % 6 + 1}`), lineStyle: { width: 2, type: DASHES[i % DASHES.length] },
      data: grid.contexts_tokens.map((c, j) => [Math.log2(c), s.max_users[j] || null]),
    }));
    if (series.length) {
      series[0].markLine = mark(Math.log2(data.chosen.context_tokens), `${short(data.chosen.context_tokens)} asked`, "xAxis");
      series[0].markLine.data.push({ yAxis: data.chosen.num_users, label: { formatter: people(data.chosen.num_users), position: "insideStartTop" } });
    }
    const ends = [grid.contexts_tokens[0], grid.contexts_tokens[grid.contexts_tokens.length - 1]].map(Math.log2);
    const first = Math.floor(ends[0]), last = Math.ceil(ends[1]);
    target.setOption({
      ...base,
      grid: { left: 58, right: 22, top: 30 + legendHeight(target, surfaces.map((s) => s.kv_cache_dtype)), bottom: 46 },
      tooltip: { ...base.tooltip, formatter: (items) => tip(`${count(Math.round(2 ** items[0].value[0]))} tokens`, items.map((item) => `${item.seriesName}: ${people(item.value[1] || 0)}`)) },
      xAxis: { ...axis, type: "value", min: first, max: last, interval: last - first > (narrow() ? 8 : 14) ? 2 : 1, name: "context, tokens", nameLocation: "middle", nameGap: 28, axisLabel: { ...axis.axisLabel, formatter: (v) => short(2 ** v) } },
      yAxis: { ...axis, type: "log", logBase: 10, min: 1, name: "users", nameGap: 10, axisLabel: { ...axis.axisLabel, formatter: count } },
      series,
    }, true);
  }

  function drawSpeed() {
    const target = chart("chart-speed");
    if (!target) return;
    const { base, axis, line } = common();
    const row = state.users, users = grid.users[row];
    const series = [];
    let longest = 0;
    surfaces.forEach((s, i) => {
      if (!s.itl_s) return;
      const points = [];
      grid.contexts_tokens.forEach((c, j) => {
        if (users <= s.max_users[j]) points.push([c, s.itl_s[row][j] * 1e3, s.itl_low_s[row][j] * 1e3, s.itl_high_s[row][j] * 1e3]);
      });
      const end = s.limit_context_tokens[row];
      if (end !== null && (!points.length || end > points[points.length - 1][0])) points.push([end, s.limit_itl_s[row] * 1e3, s.limit_low_s[row] * 1e3, s.limit_high_s[row] * 1e3]);
      if (!points.length) return;
      longest = Math.max(longest, points[points.length - 1][0]);
      const paint = colour(`--s${i % 6 + 1}`), name = s.kv_cache_dtype;
      const band = { type: "line", stack: name, silent: true, symbol: "none", lineStyle: { opacity: 0 }, tooltip: { show: false }, stackStrategy: "all" };
      series.push({ ...band, name: `${name} low`, data: points.map((p) => [p[0], p[2]]) });
      series.push({ ...band, name: `${name} high`, areaStyle: { color: paint, opacity: 0.1 }, data: points.map((p) => [p[0], p[3] - p[2]]) });
      series.push({ name, type: "line", symbol: SYMBOLS[i % SYMBOLS.length], symbolSize: 6, color: paint, lineStyle: { width: 2, type: DASHES[i % DASHES.length] }, data: points });
      for (const [kind, words, filled] of [["whole_step", "measured step", true], ["kernel", "measured kernel", false]]) {
        const found = data.points.filter((p) => p.kind === kind && p.kv_cache_dtype === name && p.num_users === users);
        if (!found.length) continue;
        longest = Math.max(longest, ...found.map((p) => p.context_tokens));
        series.push({ name: `${name}, ${words}`, type: "scatter", symbol: "circle", symbolSize: 10, itemStyle: { color: filled ? paint : "transparent", borderColor: paint, borderWidth: 2 }, data: found.map((p) => [p.context_tokens, p.itl_s * 1e3, p.low_s * 1e3, p.high_s * 1e3]) });
      }
    });
    const shown = series.filter((s) => !/ (low|high)$/.test(s.name));
    byId("speed-users").textContent = people(users);
    byId("speed-empty").hidden = shown.length > 0;
    byId("chart-speed").hidden = shown.length === 0;
    if (!shown.length) return;
    const asked = data.chosen.context_tokens;
    if (asked <= longest) shown[0].markLine = mark(asked, `${short(asked)} asked`, "xAxis");
    const gap = tickStep(longest);
    target.resize();
    target.setOption({
      ...base,
      legend: { ...base.legend, data: shown.map((s) => s.name) },
      grid: { left: 58, right: 24, top: 30 + legendHeight(target, shown.map((s) => s.name)), bottom: 46 },
      tooltip: { ...base.tooltip, trigger: "item", formatter: (item) => tip(`${item.seriesName}, ${count(item.value[0])} tokens`, [seconds(item.value[1] / 1e3), `80%: ${seconds(item.value[2] / 1e3)} to ${seconds(item.value[3] / 1e3)}`]) },
      xAxis: { ...axis, type: "value", min: 0, max: longest, interval: gap, name: "context, tokens", nameLocation: "middle", nameGap: 28, axisLabel: { ...axis.axisLabel, showMaxLabel: longest % gap === 0, formatter: (v) => short(Math.round(v)) }, splitLine: { show: false } },
      yAxis: { ...axis, type: "value", min: 0, name: "ms", nameGap: 10, splitLine: { lineStyle: { color: line } } },
      series,
    }, true);
  }

  function tickStep(longest) {
    let gap = 1024;
    while (longest / gap > (narrow() ? 4 : 8)) gap *= 2;
    return longest < 2048 ? Math.max(1, Math.floor(longest / 4)) : gap;
  }

  function draw() {
    drawMemory();
    drawCapacity();
    drawSpeed();
  }

  // ------------------------------------------------------------------ wiring

  for (const [id, key] of [["users", "users"], ["context", "context"], ["precision", "surface"]]) {
    const control = byId(id);
    if (key === "surface") control.selectedIndex = state.surface; else control.value = String(state[key]);
    control.addEventListener("input", () => {
      state[key] = key === "surface" ? control.selectedIndex : Number(control.value);
      answer();
      if (key === "users") drawSpeed();
      if (key === "surface") drawMap();
    });
  }

  function resized() {
    for (const item of Object.values(charts)) item.resize();
    draw();
  }

  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(resized, 120); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const PRINT_WIDTH = 660;
  window.addEventListener("beforeprint", () => {
    printing = true;
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; part.dataset.closed = ""; }
    for (const item of Object.values(charts)) item.resize({ width: PRINT_WIDTH });
    draw();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    for (const part of document.querySelectorAll("details[data-closed]")) { part.open = false; delete part.dataset.closed; }
    for (const item of Object.values(charts)) item.resize({ width: "auto" });
    draw();
  });

  answer();
  draw();
})();
