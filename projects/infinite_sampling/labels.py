"""What rows, tables, figures and claims call schedules and trainers: names, order and colours."""

FULL = "full group"
MICRO = "micro groups"
SORTED_MICRO = "sorted micro groups (oracle)"
FIFO = "continuous, FIFO"
SJF = "continuous, SJF (predicted)"
LPT = "continuous, LPT (predicted)"
FRAMEWORK = "framework (predicted)"
FRAMEWORK_LPT = "framework, LPT refill (predicted)"
ORACLE = "plan (oracle)"
DYNAMIC = "dynamic slots"
DYNAMIC_LPT = "dynamic slots, LPT (predicted)"
SCHEDULES = (
    FULL,
    MICRO,
    SORTED_MICRO,
    FIFO,
    SJF,
    LPT,
    FRAMEWORK,
    FRAMEWORK_LPT,
    ORACLE,
    DYNAMIC,
    DYNAMIC_LPT,
)

GENERATE_FULL = "generate, full group"
GENERATE_CHUNKS = "generate, chunks"
GENERATE_BATCH = "generate_batch"
PEERS = (GENERATE_FULL, GENERATE_CHUNKS, GENERATE_BATCH)

OTHER_SEED = "full group, another seed"  # what completions have in common by chance

# decode modes of the memory table, beside full group and micro groups
FIXED_SLOTS = "continuous, fixed slots"
DYNAMIC_SLOTS = "continuous, dynamic slots"
FULL_FRAMEWORK = "full framework"

# trainers, beside full group and micro groups
TRAINED_FRAMEWORK = "framework"
TRL = "TRL"
TRL_OURS = "TRL, this rollout"
TRAINERS = (FULL, MICRO, TRAINED_FRAMEWORK, TRL, TRL_OURS)

# by names of the palette; the framework has one colour in whatever figure
EVOLUTION_COLOURS = {
    MICRO: "orange",
    SORTED_MICRO: "amber",
    FIFO: "sky",
    FRAMEWORK: "blue",
    ORACLE: "green",
}
MEMORY_COLOURS = {FULL: "orange", MICRO: "sky", FULL_FRAMEWORK: "blue"}
TRAINER_COLOURS = {
    MICRO: "amber",
    TRAINED_FRAMEWORK: "blue",
    TRL: "orange",
    TRL_OURS: "black",
}
PREDICTOR_COLOURS = {"constant": "black", "transformer": "blue", "ridge": "green"}
