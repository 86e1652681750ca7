"""The names under which methods, variants and data sets stand in rows, tables and figures."""

TASK_IF = "task-IF"
GAMMA = "task-IF (Gamma)"
FOUR_TERMS = "four terms"
GAUSS_NEWTON = "Gauss-Newton (TLXML)"
DIRECT_HESSIAN = "total gradient, direct Hessian"
DIRECT_IF = "direct-IF"
GAMMA_SERIES = "task-IF (Gamma, Neumann 10)"
EKFAC = "EK-FAC"
TRAK = "TRAK"
TRACIN = "TracIn"
GRADIENT_DOT = "gradient dot"
LOSS_VALUE = "loss value"
GRADIENT_NORM = "gradient norm"
RANDOM = "random"
INSTANCE_IF = "instance-IF"
NO_EDIT = "no edit"  # the model as it is: what every edit must beat

# what tasks are scored by (`estimators.METHODS` has their parts)
METHODS = (TASK_IF, GAMMA, FOUR_TERMS, GAUSS_NEWTON, DIRECT_HESSIAN, DIRECT_IF)

BASELINES = (EKFAC, TRAK, TRACIN, GRADIENT_DOT, LOSS_VALUE, GRADIENT_NORM, RANDOM)

# what no method chose: rows beside those of the methods
ALL_TASKS = "all tasks"
WITHOUT_SPOILED = "without the spoiled tasks"
FROM_SCRATCH = "Retrain"

# how tasks are spoiled
PERMUTED = "permuted labels"
SHORTCUT = "permuted labels, shown in the images"

# what `cost` times
SCORE_ALL = "score all tasks"
EDIT_ONE = "edit one task out"
RETRAIN_WITH_HESSIAN = "retrain without one, Hessian at hand"
RETRAIN_BY_LBFGS = "retrain without one, L-BFGS"
RETRAIN_PREFIX = "retrain"

# how the systems of `depth` are solved
DENSE = "dense"
NEUMANN = "Neumann"

# our data: the paper's
STAND_INS = {
    "quickdraw": "Omniglot",
    "mnist": "MNIST",
    "cifar10": "MINI-ImageNet",
    "fashion-mnist": "FC100",
}

GREY = "#999999"
# Colours are names of `shared.figures.PALETTE`, or written out; lines are drawn in this order.
LOOKS: dict[str, dict[str, object]] = {
    TASK_IF: {"color": "blue", "linewidth": 2.8, "zorder": 5},
    GAMMA: {"color": "sky"},
    GAUSS_NEWTON: {"color": "green"},
    DIRECT_IF: {"color": "orange"},
    EKFAC: {"color": "amber"},
    TRACIN: {"color": "purple"},
    LOSS_VALUE: {"color": "black", "linestyle": "--"},
    GRADIENT_NORM: {"color": GREY, "linestyle": "--"},
    RANDOM: {"color": GREY, "linestyle": ":"},
}
