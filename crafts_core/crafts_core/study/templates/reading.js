"use strict";
// One image: answers by key or pointer, zoom, and saving. The page is loaded anew for each image.

const byId = (id) => document.getElementById(id);
const told = byId("told");

async function post(path, body) {
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (response.ok) return await response.json();
    if (response.status === 409) location.reload();
    else tell("This could not be saved. Please tell the study coordinator.", true);
  } catch {
    tell("Not saved: the study program does not answer. Start it again, then press Enter here.", true);
  }
  return null;
}

function tell(text, isWrong = false) {
  told.textContent = text;
  told.classList.toggle("wrong", isWrong);
}

async function undo() {
  if (!byId("undo") || byId("undo").disabled) return;
  if (await post("undo", {})) location.reload();
}

function watch(image) {
  // Seconds for which the image was there and the window in view.
  let seconds = 0;
  let since = null;
  const start = () => { if (since === null && !document.hidden) since = performance.now(); };
  const stop = () => { if (since !== null) seconds += (performance.now() - since) / 1000; since = null; };
  if (image.complete) start(); else image.addEventListener("load", start);
  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : start()));
  return () => { stop(); start(); return Math.min(seconds, 86400); };
}

function zoomable(frame, image) {
  let scale = 1, x = 0, y = 0, grip = null;
  const fingers = new Map();
  function show() {
    const room = (size) => Math.min(0, size - size * scale);
    x = Math.min(0, Math.max(room(frame.clientWidth), x));
    y = Math.min(0, Math.max(room(frame.clientHeight), y));
    image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    frame.classList.toggle("zoomed", scale > 1);
    byId("level").textContent = `${Math.round(scale * 100)} %`;
  }
  function zoom(factor, atX = frame.clientWidth / 2, atY = frame.clientHeight / 2) {
    const next = Math.min(8, Math.max(1, scale * factor));
    x = atX - ((atX - x) * next) / scale;
    y = atY - ((atY - y) * next) / scale;
    scale = next;
    show();
  }
  const place = (event) => {
    const box = frame.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return Math.hypot(a[0] - b[0], a[1] - b[1]);
  };
  frame.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), ...place(event));
  }, { passive: false });
  frame.addEventListener("dblclick", (event) => zoom(scale > 1 ? 1 / scale : 3, ...place(event)));
  frame.addEventListener("pointerdown", (event) => {
    frame.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, place(event));
    grip = fingers.size === 2 ? spread() : null;
  });
  frame.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = place(event);
    fingers.set(event.pointerId, now);
    if (fingers.size === 1) { x += now[0] - before[0]; y += now[1] - before[1]; show(); }
    else if (grip) { const next = spread(); zoom(next / grip, ...now); grip = next; }
  });
  for (const name of ["pointerup", "pointercancel"]) {
    frame.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  return {
    zoom,
    whole: () => { scale = 1; show(); },
    move: (dx, dy) => { x += dx; y += dy; show(); },
    isZoomed: () => scale > 1,
  };
}

function typeList(filter, list, choose) {
  const options = [...list.children];
  let at = null;
  const shown = () => options.filter((option) => !option.hidden);
  function point(option) {
    at?.classList.remove("at");
    at = option ?? null;
    at?.classList.add("at");
    at?.scrollIntoView({ block: "nearest" });
    if (at) filter.setAttribute("aria-activedescendant", at.id);
    else filter.removeAttribute("aria-activedescendant");
  }
  function take(option) {
    options.forEach((each) => each.setAttribute("aria-selected", String(each === option)));
    filter.value = option.textContent;
    choose(option.dataset.value);
  }
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    options.forEach((option) => {
      option.hidden = !words.every((word) => option.dataset.words.includes(word));
      option.setAttribute("aria-selected", "false");
    });
    choose(null);
    point(shown()[0]);
  });
  filter.addEventListener("focus", () => filter.select());
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) take(option);
  });
  return {
    step: (by) => point(shown()[Math.max(0, shown().indexOf(at) + by)] ?? at),
    take: () => { if (at) take(at); return Boolean(at); },
  };
}

function readTrial(main) {
  const questions = [...document.querySelectorAll(".question")];
  const answers = {};
  const seconds = watch(byId("image"));
  const view = zoomable(byId("frame"), byId("image"));
  const save = byId("save");
  let now = 0;
  let isSaving = false;
  let isSaved = false;

  function attend(place) {
    now = Math.min(Math.max(place, 0), questions.length);
    questions.forEach((question, index) => question.classList.toggle("now", index === now));
    save.disabled = questions.some((question) => !(question.dataset.name in answers));
    const question = questions[now];
    question?.scrollIntoView({ block: "nearest" });
    if (question?.dataset.name === "type_guess") byId("filter").focus();
    else { document.activeElement?.blur(); if (!question && !save.disabled) save.focus(); }
  }
  function answer(question, value) {
    if (isSaved || isSaving) return;
    const { name } = question.dataset;
    if (value === null) delete answers[name]; else answers[name] = value;
    question.querySelectorAll("[data-value][aria-pressed]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.value) === value));
    });
    if (value === null) { save.disabled = true; return; }
    const open = questions.findIndex((each) => !(each.dataset.name in answers));
    attend(open < 0 ? questions.length : open);
  }
  async function finish() {
    if (isSaved) { location.reload(); return; }
    if (save.disabled || isSaving) return;
    isSaving = true;
    const body = { trial: main.dataset.trial, seconds: seconds(), ...answers };
    const result = await post("answer", body);
    isSaving = false;
    if (!result) return;
    isSaved = true;
    if (!("truth" in result)) { location.reload(); return; }
    tell(`This image is ${result.truth}.${result.type ? ` Tissue: ${result.type}.` : ""}`);
    save.textContent = "Next image";
    byId("undo").disabled = true;
    save.focus();
  }

  questions.forEach((question, place) => {
    question.addEventListener("pointerdown", () => { if (place !== now) attend(place); });
    question.querySelectorAll("button[data-value]").forEach((button) => {
      button.addEventListener("click", () => answer(question, Number(button.dataset.value)));
    });
  });
  const filter = byId("filter");
  const types = filter && typeList(filter, byId("types"), (value) => {
    answer(filter.closest(".question"), value);
  });
  byId("in").addEventListener("click", () => view.zoom(1.5));
  byId("out").addEventListener("click", () => view.zoom(1 / 1.5));
  byId("whole").addEventListener("click", view.whole);
  save.addEventListener("click", finish);

  const moves = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] };
  function typingKey(event) {
    if (event.key === "ArrowDown") types.step(1);
    else if (event.key === "ArrowUp") types.step(-1);
    else if (event.key === "Enter") { if (!types.take() && "type_guess" in answers) finish(); }
    else if (event.key === "Backspace" && filter.value === "") attend(now - 1);
    else if (event.key === "Escape") filter.blur();
    else return;
    event.preventDefault();
  }
  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === filter) { typingKey(event); return; }
    const question = questions[now];
    const choice = question?.querySelector(`button[data-value="${CSS.escape(event.key)}"]`);
    if (choice) choice.click();
    else if (event.key === "Enter") finish();
    else if (event.key === "Backspace") attend(now - 1);
    else if (event.key === "+" || event.key === "=") view.zoom(1.5);
    else if (event.key === "-") view.zoom(1 / 1.5);
    else if (event.key === "0") view.whole();
    else if (event.key === "u" || event.key === "U") undo();
    else if (event.key in moves && view.isZoomed()) view.move(...moves[event.key]);
    else return;
    event.preventDefault();
  }
  document.addEventListener("keydown", (event) => { if (!event.repeat || event.key in moves) key(event); });
  attend(0);
}

byId("undo")?.addEventListener("click", undo);
if (byId("trial")) readTrial(byId("trial"));
else document.addEventListener("keydown", (event) => { if (event.key.toLowerCase() === "u") undo(); });
