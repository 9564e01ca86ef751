"""Names of metrics, for those who read a log. Needs nothing but Python."""

import re

EVAL_REWARD = re.compile(r"eval_(?:.+_)?reward")  # of an evaluation, with the name of its data where there are several
EVAL_LOSS = re.compile(
    r"eval_(?:.+_)?(diversity|motion)"
)  # what a policy may lose; the group is the metric's name in training lines
EVAL_SCORE = re.compile(rf"{EVAL_REWARD.pattern}(?:s/.+/mean)?")  # that, or one of its reward functions alone
