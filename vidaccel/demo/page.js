// The visitor of the page, and its two clips in step. Runs in the head, before Gradio.

// Who this browser is, kept in it, and the run that this tab follows, kept in the tab: after a
// reload the page goes on where it was. Gradio asks with each event, since one can come before
// the page has answered that it was opened.
(() => {
  let token = Array.from(crypto.getRandomValues(new Uint8Array(16)),
                         byte => byte.toString(16).padStart(2, '0')).join('');
  let following = '';
  try {  // a browser can forbid storage; then the page forgets when it is reloaded
    token = localStorage.vidaccelOwner ||= token;
    following = sessionStorage.vidaccelJob || '';
  } catch {}
  window.vidaccel = {
    owner: () => token,
    job: () => following,
    remember: (job) => {
      following = job;
      try { sessionStorage.vidaccelJob = job; } catch {}
      document.querySelector('#status').scrollIntoView({block: 'nearest', behavior: 'smooth'});
    },
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
