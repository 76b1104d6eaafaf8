// Conversations, kept in this browser. One is {id, system, messages}; an answer of it has pieces, {text, loops}.

const PLACE = "melt-conversations";

export class Conversations {
  constructor() {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "null");
    this.all = kept?.all ?? [];
    this.current = this.all.find((one) => one.id === kept?.current) ?? this.add();
  }

  add() {
    const empty = this.all.find((one) => !one.messages.length);
    this.current = empty ?? { id: `${Date.now()}-${Math.random()}`, system: "", messages: [] };
    if (!empty) this.all.unshift(this.current);
    this.keep();
    return this.current;
  }

  choose(id) {
    this.current = this.all.find((one) => one.id === id);
    this.keep();
  }

  remove(id) {
    this.all = this.all.filter((one) => one.id !== id);
    if (this.current.id === id) this.current = this.all[0] ?? this.add();
    this.keep();
  }

  /** Whether they could be kept: a browser gives a page only so much room. */
  keep() {
    try {
      localStorage.setItem(PLACE, JSON.stringify({ all: this.all, current: this.current.id }));
      return true;
    } catch {
      return false;
    }
  }
}

/** The messages of a conversation as a model is asked. */
export function asked(conversation) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...conversation.messages.map(({ role, content }) => ({ role, content }))];
}
