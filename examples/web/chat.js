// A chat to token ids. Control tokens are those that the chat template writes: in messages their names are text, as in
// runtime/melt_runtime/text/control.py.

const MARKER = /^(<\|.*\|>|<｜.*｜>)$/s;
const TAG = /^(<\/?\w+_\w+>|<\/?think>)$/; // markers that models write in text
const FIRST_STAND_IN = 0xf0000; // the first character of a plane for private use

export class ChatEncoder {
  /**
   * @param Tokenizer the class of @huggingface/tokenizers
   * @param form the object of tokenizer.json
   * @param template what renders a chat
   * @param {string} source of the template
   */
  constructor(Tokenizer, form, template, source) {
    const named = ({ content }) => TAG.test(content) || (source.includes(content) && /[^\p{L}\p{N}\s]/u.test(content));
    const always = ({ special, content }) => special || MARKER.test(content);
    const added = form.added_tokens ?? [];
    const control = added.filter((token) => always(token) || named(token));
    this.ids = new Map(control.map(({ id, content }) => [content, id]));
    this.any = matcher(control);
    this.always = matcher(added.filter(always));
    const letters = [...new Set(control.map(({ content }) => [...content][0]))];
    this.standIns = new Map(letters.map((letter, place) => [letter, String.fromCodePoint(FIRST_STAND_IN + place)]));
    this.template = template;
    this.tokenizer = new Tokenizer(form, {});
    this.plain = new Tokenizer({ ...form, added_tokens: added.filter((token) => !control.includes(token)) }, {});
  }

  render(messages) {
    return this.template.render({ messages, add_generation_prompt: true, tools: null, documents: null });
  }

  /** Token ids of a chat, ready for an answer. */
  encode(messages) {
    const text = this.render(messages);
    let marked = this.render(this.marked(messages, (content) => this.replaced(content, this.standIns)));
    // A template that looks at such characters goes elsewhere: there only whole names are marked.
    if (this.restored(marked) !== text) marked = this.render(this.marked(messages, (content) => this.whole(content, this.any)));
    const unmarked = this.restored(marked);
    const count = (value) => [...value.matchAll(this.any)].length;
    if (count(unmarked) === count(marked)) return this.idsOf(this.tokenizer, unmarked);
    const ids = [];
    let end = 0;
    for (const match of marked.matchAll(this.any)) {
      ids.push(...this.idsOf(this.plain, this.restored(marked.slice(end, match.index))), this.ids.get(match[0]));
      end = match.index + match[0].length;
    }
    return [...ids, ...this.idsOf(this.plain, this.restored(marked.slice(end)))];
  }

  idsOf(tokenizer, text) {
    return text ? tokenizer.encode(text, { add_special_tokens: false }).ids : [];
  }

  marked(messages, mark) {
    // In a model's own words only tokens that no model writes as text are marked.
    const own = (content) => this.whole(content, this.always);
    return messages.map(({ role, content }) => ({ role, content: role === "assistant" ? own(content) : mark(content) }));
  }

  whole(text, names) {
    return text.replace(names, (name) => this.replaced([...name][0], this.standIns) + name.slice([...name][0].length));
  }

  restored(text) {
    return this.replaced(text, new Map([...this.standIns].map(([letter, standIn]) => [standIn, letter])));
  }

  replaced(text, letters) {
    return [...letters].reduce((made, [from, to]) => made.replaceAll(from, to), text);
  }
}

/** Finds the names of tokens, of several at one place the longest. */
function matcher(tokens) {
  const names = tokens.map(({ content }) => content.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  return new RegExp(names.sort((one, other) => other.length - one.length).join("|") || "(?!)", "g");
}
