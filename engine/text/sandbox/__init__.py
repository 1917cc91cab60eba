"""jinja2 for templates that nobody has read: what a rendering may cost is counted, and cut off.

jinja2's own sandbox keeps a template away from Python's internals. It does not keep it from running for ever or from
filling memory, and a chat template is part of a checkpoint that anybody may have published. Here every rendering has a
`Budget` of work (time) and of what it makes (memory), both proportional to what goes in. They are charged

* by the source (metering.py): each body of statements (a loop's, a branch's, a macro's) begins by paying for its own
  nodes, and each turn of a loop is paid for;
* by operations (costs.py): calls, filters, tests, operators, comparisons, slices and every piece of output, by the size
  of what they read and make. What could make much of little (`*`, `join`, `center`, `"%9d"`) is estimated before it is
  done.

Only listed functions, methods of strings, lists and dicts, and filters can be called at all: one that is not listed
has not been looked at. Budgets are counted, not timed, so a template renders everywhere or nowhere.
"""

from engine.text.sandbox.budget import BUDGET, MAX_MADE, MAX_WORK, Budget
from engine.text.sandbox.environment import Sandbox

__all__ = ["BUDGET", "MAX_MADE", "MAX_WORK", "Budget", "Sandbox"]
