"""The names under which methods stand in rows, tables and figures."""

FP32 = "ACDC, fp32"
RTN = "ACDC, all low (RTN)"
PAHQ = "PAHQ"
PAHQ_SENDER = "PAHQ, sender"
PAHQ_BOTH = "PAHQ, receiver and sender"
RELEASED = "PAHQ, as released"
EAP = "EAP"
EAP_IG = "EAP-IG"
HISP = "HISP"
SP = "subnetwork probing"
PLAIN = "plain ACDC, hooks"

# rows that no method made
RANDOM = "random edges"
NONE = "no edges"
ALL = "all edges"

KINDS = {
    FP32: "fp32",
    RTN: "rtn",
    PAHQ: "pahq-receiver",
    PAHQ_SENDER: "pahq-sender",
    PAHQ_BOTH: "pahq-both",
}

# names of `shared.figures.PALETTE`
COLOURS = {
    FP32: "black",
    PAHQ: "blue",
    RTN: "orange",
    RELEASED: "purple",
    EAP: "green",
    EAP_IG: "sky",
    HISP: "amber",
    SP: "purple",
    RANDOM: "black",
}

EFFECTS, CIRCUIT, ATTRIBUTION = "effects", "circuit", "attribution"  # kinds of rows of `trained`
AREA, POINT = "area", "point"  # kinds of rows of `ground_truth`


def circuit_array(task: str, scope: str) -> str:
    """Under which `pretrained` keeps the edges of PAHQ's circuit."""
    return f"{task}_{scope}".replace("-", "_")
