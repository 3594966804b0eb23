// Search without a server: a browser starts no worker from file://, so this one runs in a frame.
// The theme's offline plugin would fetch such a thing from elsewhere.
if (location.protocol === "file:") {
  window.Worker = class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inner = frame.contentWindow;
      const own = new URL(url, location);
      const deliver = (target, data) => setTimeout(() => {
        const event = new MessageEvent("message", { data });
        target.dispatchEvent(event);
        target.onmessage?.(event);
      });
      const load = (address) => new Promise((done, failed) => {
        const script = inner.document.createElement("script");
        script.src = new URL(address, own);
        script.onload = done;
        script.onerror = failed;
        inner.document.head.append(script);
      });
      inner.postMessage = (data) => deliver(this, data);
      inner.importScripts = (...addresses) => Promise.all(addresses.map(load));
      this.ready = load(own);
      this.postMessage = (data) => this.ready.then(() => {
        const event = new inner.MessageEvent("message", { data });
        inner.dispatchEvent(event);
      });
      this.terminate = () => frame.remove();
    }
  };
}
