"""Questions put to trained models: what a task is (asking), where documents come from (documents), the usual tasks by
their usual rules (known), how likely a model holds a continuation to be (scoring), and figures (results).

Empty, because settings are checked against `asking` by what `scoring` is built on.
"""
