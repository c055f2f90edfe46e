// From a log's raw bytes to the lines a person reads. Text only: nothing here knows the page or the network.
//
// The bytes may be cut anywhere, also inside a UTF-8 character or an ANSI sequence; the lines are the same for every
// way of cutting. `\n` ends a line. `\r` returns to its start: what comes next replaces it (a progress bar redraws
// itself so), and a line that ends with `\r\n` keeps its text. ANSI sequences and other control characters are left out.
"use strict";

// A whole sequence: CSI (colours, cursor), OSC (window titles), or ESC and one letter. Longer ones than these are text.
const ANSI = /\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b\r\n]{0,2048}(?:\x07|\x1b\\)|[ -/]{0,8}[0-Z\\^-~])/g;
// The start of one at the end of a chunk: its rest comes with the next chunk.
const ANSI_CUT = /\x1b(?:\[[0-?]{0,64}[ -/]{0,8}|\][^\x07\x1b\r\n]{0,2048}\x1b?|[ -/]{0,8})$/;
const CONTROL = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]/g;

class LogText {
  constructor(mostLines = 5000) {
    this.mostLines = mostLines;
    this.clear();
  }

  clear() {
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.pending = "";
    this.finished = []; // the last lines that ended
    this.dropped = 0; // how many ended lines came before them
    this.current = "";
    this.returned = false;
  }

  // How many lines have ended so far, the dropped ones included.
  get ended() {
    return this.dropped + this.finished.length;
  }

  write(bytes) {
    let text = this.pending + this.decoder.decode(bytes, { stream: true });
    this.pending = "";
    const cut = ANSI_CUT.exec(text);
    if (cut) {
      this.pending = cut[0];
      text = text.slice(0, cut.index);
    }
    text = text.replace(ANSI, "").replace(CONTROL, "");
    let start = 0;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", start)) {
      this.extend(text.slice(start, end));
      this.finished.push(this.current);
      this.current = "";
      this.returned = false;
      start = end + 1;
    }
    this.extend(text.slice(start));
    if (this.finished.length > 2 * this.mostLines) this.drop();
  }

  // `text` holds no line end. Only the last piece between returns that has any text stays.
  extend(text) {
    const pieces = text.split("\r");
    for (const [index, piece] of pieces.entries()) {
      if (index > 0) this.returned = true;
      if (!piece) continue;
      this.current = this.returned ? piece : this.current + piece;
      this.returned = false;
    }
  }

  drop() {
    const surplus = this.finished.length - this.mostLines;
    this.finished.splice(0, surplus);
    this.dropped += surplus;
  }

  // The ended lines from number `first` on, at most the last `mostLines`: [number of the first one, lines].
  endedFrom(first) {
    const from = Math.max(first, this.ended - this.mostLines, this.dropped);
    return [from, this.finished.slice(from - this.dropped)];
  }
}
