// The visitor of the page, and its two clips in step. Runs in the head, before Gradio.

// Who this browser is, kept in it, and the run that this tab follows, kept in the tab: after a
// reload the page goes on where it was, with the same accordions open. Gradio asks with each event,
// since one can come before the page has answered that it was opened.
(() => {
  const ASK_EVERY = 300, ANSWERED_WITHIN = 5000;  // milliseconds
  const OPEN = 2;  // questions that may wait for an answer
  let token = Array.from(crypto.getRandomValues(new Uint8Array(16)),
                         byte => byte.toString(16).padStart(2, '0')).join('');
  let following = '', opened = '', asked = 0, askedAt = 0;
  try {  // a browser can forbid storage; then the page forgets when it is reloaded
    token = localStorage.vidaccelOwner ||= token;
    following = sessionStorage.vidaccelJob || '';
    opened = sessionStorage.vidaccelOpened || '';
  } catch {}
  addEventListener('pagehide', () => {
    const open = Array.from(document.querySelectorAll('[id] > .label-wrap.open'),
                            header => header.parentElement.id);
    try { sessionStorage.vidaccelOpened = open.join(','); } catch {}
  });
  const bring = (selector) => document.querySelector(selector)
    .scrollIntoView({block: 'nearest', behavior: 'smooth'});
  window.vidaccel = {
    owner: () => token,
    job: () => following,
    opened: () => opened,
    heard: () => document.querySelector('#heard')?.textContent.trim() || '',
    ask: () => { askedAt = performance.now(); return `question-${++asked}`; },
    remember: (job) => {
      following = job;
      try { sessionStorage.vidaccelJob = job; } catch {}
      bring('#status');
    },
    look: () => bring(document.querySelector('#status .va-error') ? '#status' : '#pair'),
  };
  // Ask how far the run is, until the page has been told of its end. It never waits for ever: what
  // is not answered, since a connection was lost, is asked again.
  setInterval(() => {
    const [job, , , state, question] = vidaccel.heard().split(' ');
    if (!following || (job === following && state === 'over')) return;
    const answered = question === `question-${asked}` || asked === 0;
    if (!answered && performance.now() - askedAt < ANSWERED_WITHIN) return;
    document.querySelector('#ask')?.click();
  }, ASK_EVERY);
  // A browser makes six connections or so to a server, and another one only when one of them has
  // ended. So that questions on lost ones never take up all of them, old questions are given up:
  // their connection is closed, and Gradio is not told, which would call that an error.
  const waiting = new Set(), send = window.fetch;
  const isQuestion = (body) => {
    try { return /^question-\d+$/.test(JSON.parse(body).data.at(-1)); } catch { return false; }
  };
  window.fetch = async (resource, options) => {
    if (!isQuestion(options?.body)) return send(resource, options);
    const question = new AbortController();
    waiting.add(question);
    if (waiting.size > OPEN) {
      const [oldest] = waiting;
      waiting.delete(oldest);
      oldest.abort();
    }
    try {
      const answer = await send(resource, {...options, signal: question.signal});
      return new Response(await answer.blob(), answer);
    } catch (error) {
      if (question.signal.aborted) return new Promise(() => {});
      throw error;
    } finally {
      waiting.delete(question);
    }
  };
})();

// Two clips in step: what happens to one of them happens to the other.
(() => {
  const pair = {original: 'accelerated', accelerated: 'original'};
  const partner = (event) => {
    const box = event.target.closest?.('#original, #accelerated');
    return box && document.querySelector(`#${pair[box.id]} video`);
  };
  const follow = (event) => {
    const leader = event.target, other = partner(event);
    if (!other || other.readyState < 1) return;
    if (Math.abs(other.currentTime - leader.currentTime) > 0.06)
      other.currentTime = leader.currentTime;
    if (event.type === 'play' && other.paused) other.play().catch(() => {});
    if (event.type === 'pause' && !other.paused && !leader.ended) other.pause();
    if (event.type === 'ratechange') other.playbackRate = leader.playbackRate;
  };
  // Media events do not bubble, but they can be captured. The accelerated clip leads while both
  // play, so that they do not pull each other to and fro.
  for (const type of ['play', 'pause', 'seeked', 'ratechange'])
    document.addEventListener(type, follow, true);
  document.addEventListener('timeupdate', (event) => {
    if (event.target.closest?.('#accelerated') && !event.target.paused) follow(event);
  }, true);
})();

// Names for those who do not see the page, where Gradio gives none or only a number.
(() => {
  const name = (selector, text) => {
    for (const element of document.querySelectorAll(selector))
      if (element.getAttribute('aria-label') !== text(element))
        element.setAttribute('aria-label', text(element));
  };
  const nameAll = () => {
    name('#original video', () => 'The original clip');
    name('#accelerated video', () => 'The accelerated clip');
    name('#pair progress', () => 'Position in the clip');
    name('#frames-shown img', () => 'Frames of the original, of the accelerated clip, and the '
      + 'difference of both');
    name(':is(#examples, #history) .thumbnail-item', button => button.innerText.trim());
  };
  new MutationObserver(nameAll).observe(document, {subtree: true, childList: true});
})();

// Gradio ends its own connection when the page is left, and calls that an error. Its listener comes
// before this one, so what it says then is held back until it is known whether the page is left.
(() => {
  let leaving = false;
  addEventListener('beforeunload', () => { leaving = true; });
  const error = console.error;
  console.error = (...words) => {
    if (/Connection errored out|AbortError/.test(words.join(' ')))
      setTimeout(() => leaving || error(...words));
    else error(...words);
  };
})();
