# ruff: noqa: E501
"""Templates that would run without end, fill the memory, crash Python, or reach what they must not.

Run as a program, it renders each and prints what came out, a line of JSON each; the last line is the
address space that all of them needed, in bytes (Linux).
"""

import json
import sys

from address_space import mapped_bytes

from melt_runtime.errors import MeltError
from melt_runtime.text import templates

HOSTILE = {
    "power": "{{ 10**10000000 }}",
    "power in a loop": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "long text": "{{ 'a'*10**9 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling ~": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling join": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}{{ ns.x }}",
    "doubling str.join": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}{{ ns.x }}",
    "doubling set": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}{{ ns.x }}",
    "doubling format": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling %": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = '%(a)s%(a)s' % {'a': ns.x} %}{% endfor %}{{ ns.x }}",
    "doubling filter format": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = '%s%s'|format(ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling filter block": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{% filter replace('a', 'aa') %}{{ ns.x }}{% endfilter %}{% endset %}{% endfor %}{{ ns.x }}",
    "doubling list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "shared lists printed": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared lists compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "shared lists in": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x in [ns.y] }}",
    "shared lists test": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x is eq(ns.y) }}",
    "shared lists JSON": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "shared lists string": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|string|length }}",
    "shared lists format": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '{!r}'.format(ns.x) }}",
    "shared lists changed": "{% set ns = namespace(x=[1],y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{% for i in [1,2] %}{{ loop.changed(ns.x if i == 1 else ns.y) }}{% endfor %}",
    "shared tuples hashed": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {}[ns.x] }}",
    "deep tuples hashed": "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {}[ns.x] }}",
    "deep tuples in": "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ ns.x in {} }}",
    "deep tuples get": "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {}.get(ns.x) }}",
    "deep tuples key": "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "deep tuples unique": "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ [ns.x]|unique|list }}",
    "deep lists printed": "{% set ns = namespace(x=[1]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "range": "{{ range(10**9)|list }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "nested select": "{% for i in range(99999) %}{{ range(99999)|select('none')|list }}{% endfor %}",
    "nested sum": "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "nested length": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "nested sort": "{% for i in range(99999) %}{{ range(99999)|sort|first }}{% endfor %}",
    "nested in": "{% for i in range(99999) %}{{ 'x' in range(99999) }}{% endfor %}",
    "nested max": "{% for i in range(99999) %}{{ range(99999)|max }}{% endfor %}",
    "nested join": "{% for i in range(99999) %}{% set x = range(99999)|join %}{% endfor %}",
    "search": "{% set a = 'a' * 12000 %}{% set b = 'a' * 6000 ~ 'b' %}{% for i in range(99999) %}{% if b in a %}{% endif %}{% endfor %}",
    "search find": "{% set a = 'a' * 12000 %}{% set b = 'a' * 6000 ~ 'b' %}{% for i in range(99999) %}{% if a.find(b) %}{% endif %}{% endfor %}",
    "strip": "{% set a = 'a' * 1000000 %}{% set b = 'b' * 1000000 ~ 'a' %}{{ a.strip(b) }}",
    "trim": "{% set a = 'a' * 1000000 %}{% set b = 'b' * 1000000 ~ 'a' %}{{ a|trim(b) }}",
    "compare": "{% set a = 'a' * 4000000 %}{% set b = 'a' * 4000000 %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "static text": "{% for i in range(99999) %}" + "x" * 100000 + "{% endfor %}",
    "static text kept": "{% set t %}{% for i in range(99999) %}" + "x" * 100000 + "{% endfor %}{% endset %}",
    "static text of a macro": "{% macro m() %}"
    + "x" * 100000
    + "{% endmacro %}{% set t %}{% for i in range(99999) %}{{ m() }}{% endfor %}{% endset %}",
    "static text of a block": "{% block b %}"
    + "x" * 100000
    + "{% endblock %}{% set t %}{% for i in range(99999) %}{{ self.b() }}{% endfor %}{% endset %}",
    "static text of a call": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}{% call m() %}"
    + "x" * 100000
    + "{% endcall %}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "endless macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless block": "{% block b %}{{ self.b() }}{% endblock %}",
    "endless recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "wide recursive loop": "{% for x in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format nested width": "{{ '{:>{}}'.format(1, 10**9) }}",
    "format precision": "{{ '{:.1000000000f}'.format(1.0) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent nested key": "{{ '%(a(b)c)1000000000s' % {'a(b)c': 1} }}",
    "percent many": "{% set f = '%(a)s' * 100000 %}{{ f % {'a': 'x' * 100000} }}",
    "format many": "{% set f = '{0}' * 100000 %}{{ f.format('x' * 100000) }}",
    "filter format": "{{ '%1000000000d'|format(1) }}",
    "mapped format": "{{ ['%1000000000d']|map('format', 1)|list }}",
    "center": "{{ 'a'|center(10**9) }}",
    "indent": "{{ 'a\n\na'|indent(10**9) }}",
    "indent text": "{{ ('a\n' * 100000)|indent('x' * 100000) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9, 'x')|list }}",
    "wordwrap": "{{ 'a b'|wordwrap(1, wrapstring='x' * 10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "to_bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "markup ljust": "{{ ('a'|safe).ljust(10**9) }}",
    "markup format": "{{ ('{:>1000000000}'|safe).format(1) }}",
    "markup percent": "{{ ('%1000000000d'|safe) % 1 }}",
    "replace": "{{ 'a'|replace('a', 'b' * 1000)|replace('b', 'c' * 1000)|replace('c', 'd' * 1000)|replace('d', 'e' * 1000) }}",
    "str.replace": "{{ ('a' * 1000).replace('a', 'b' * 1000).replace('b', 'c' * 1000).replace('', 'd' * 1000) }}",
    "round": "{{ 5|round(-10**9) }}",
    "round ceil": "{{ 5|round(10**9, 'ceil') }}",
    "int base": "{% set x = ('f' * 1000000)|int(base=16) %}{{ x // (x - 1) }}",
    "int text": "{{ (10 ** 2000) * (10 ** 2000) * (10 ** 400) }}",
    "hex literal": "{% set x = 0x" + "f" * 100000 + " %}{{ x * x }}",
    "strftime": "{{ strftime_now('%c' * 1000000) }}",
    "JSON indent": "{{ [[1]]|tojson(indent=10**9) }}",
    "JSON separators": "{% set s = 'x' * 900000 %}{{ range(99999)|list|tojson(separators=(s, s)) }}",
    "cycler": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set x = c.next() %}{% endfor %}{% endfor %}",
    "joiner": "{% set j = joiner('x' * 1000000) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    "split": "{% set t = 'a ' * 1000000 %}{% for i in range(99999) %}{% set x = t.split() %}{% endfor %}",
    "split kept": "{% set t = 'a ' * 4000000 %}{% set ns = namespace(x=[]) %}{% for i in range(100) %}{% set ns.x = ns.x + [t.split(' ')] %}{% endfor %}",
    "splitlines kept": "{% set t = '\n' * 4000000 %}{% set ns = namespace(x=[]) %}{% for i in range(100) %}{% set ns.x = ns.x + [t.splitlines()] %}{% endfor %}",
    "characters": "{% set t = 'a' * 4000000 %}{% for i in range(99999) %}{% set x = t|list %}{% endfor %}",
    "loop over characters": "{% set t = 'a' * 4000000 %}{% for i in t %}{% endfor %}",
    "slices kept": "{% set t = 'a' * 4000000 %}{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [t[1:]] %}{% endfor %}",
    "upper kept": "{% set t = 'a' * 4000000 %}{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [t.upper()] %}{% endfor %}",
    "equal hashes": "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = ns.x + [(i * (2**61 - 1), 1)] %}{% endfor %}{{ dict(ns.x)|length }}",
    "equal hashes unique": "{% for i in range(99999) %}{{ ["
    + ",".join(str(k * (2**61 - 1)) for k in range(3000))
    + "]|unique|list|length }}{% endfor %}",
    "attribute path": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ([ns] * 99999)|map(attribute='a' ~ '.a' * 100000)|list|length }}",
    "fromkeys": "{{ dict.fromkeys(range(10**9)) }}",
    "generator": "{{ (range(9)|map('string')).send(1) }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "random": "{{ [1]|random(9) }}",
    "titles": "{% set t = 'a-' * 400000 %}{% for i in range(999) %}{% set x = t|title %}{% endfor %}",
    "title": "{% set t = 'a-' * 400000 %}{% for i in range(999) %}{% set x = t.title() %}{% endfor %}",
    "autoescape": "{% autoescape true %}{% set ns = namespace(x='\"') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}{% endautoescape %}",
    "escape": "{% set ns = namespace(x='\"' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x|forceescape|string|replace('&', '\"&')|string %}{% endfor %}{{ ns.x }}",
    "filtered recursive loop": "{% for x in [1] if true recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "arguments": "{% macro m() %}{{ varargs[0] }}{% endmacro %}{% for i in range(99999) %}{{ m(*range(99999)) }}{% endfor %}",
}

UNITS = 3_000_000
"""A budget that all the templates exceed in some seconds."""


def main() -> None:
    templates._UNITS = UNITS
    before = mapped_bytes("VmSize") if sys.platform == "linux" else 0
    for name, source in HOSTILE.items():
        try:
            said = templates.ChatTemplate(source).render([{"role": "user", "content": "hi"}])[:100]
        except MeltError as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([name, said]), flush=True)
    if sys.platform == "linux":
        print(json.dumps(["memory", mapped_bytes("VmPeak") - before]))


if __name__ == "__main__":
    main()
