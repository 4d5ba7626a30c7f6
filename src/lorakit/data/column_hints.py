"""What columns of other names can mean, for proposals of `data.columns`.

The names are those of public data sets (Dolly, Firefly, OpenOrca, MetaMath, XSum, SAMSum, E2E, …)
and their Chinese like. A name counts only where it can be meant in one way.
"""

import json
import re
from collections.abc import Iterable, Mapping

_MEANINGS = {
    "question": (
        "instruction prompt question query ask problem task inputs request user human "
        "user_prompt user_input user_message human_prompt "
        "问题 提问 问 题目 指令 用户 用户输入 提示 提示词"
    ),
    # Beside a question it is what that is about; alone it is the question.
    "context": (
        "input context passage background knowledge evidence paragraph "
        "输入 上下文 背景 背景知识 材料 语境 段落 输入内容"
    ),
    "document": (
        "document article dialogue dialog source src source_text mr meaning_representation "
        "original 原文 正文 文章 文档 源文本 对话内容"
    ),
    "answer": (
        "output response completion answer target targets outputs reply summary highlights ref "
        "reference human_reference solution assistant bot gpt model_output abstract translation "
        "输出 回答 答案 回复 答 摘要 参考答案 译文 答复 助手 输出内容 响应 总结"
    ),
    "system": "system system_prompt system_message 系统 系统提示 系统提示词 系统消息",
    "history": "history chat_history dialog_history 历史 历史对话 对话历史 历史记录",
    "tools": "tools functions function_definitions 工具 函数",
    "images": "images pictures photos 图片 图像",
    "image": "image picture photo img 图",
    "talk": "messages conversations conversation dialog dialogue chat turns msgs 对话 会话 消息",
    "better": (
        "chosen chosen_response response_chosen chosen_messages preferred preferred_response "
        "accepted response_accepted accepted_response better better_response pos_answer positive"
    ),
    "worse": (
        "rejected rejected_response response_rejected rejected_messages dispreferred "
        "non_preferred worse worse_response neg_answer negative"
    ),
    "text": "text content body raw_content 文本 内容 正文 文章",
}
_WORDS = {meaning: frozenset(names.split()) for meaning, names in _MEANINGS.items()}

_BARE = re.compile(r"[^\W\d][\w.]*")
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def means(name: str, meaning: str) -> bool:
    """Whether a column of this name can hold a `meaning` (`question`, `answer`, `system`, …)."""
    return re.sub(r"[\s-]+", "_", name.strip().lower()) in _WORDS[meaning]


_UNREAD = {
    "context": "it may be what the question is about",
    "system": "it may be the system message",
    "history": "it may hold the turns before the question",
    "tools": "it may describe the tools that the answers call",
}
_UNREAD_WEIGHTS = ("weight", "loss", "loss_scale", "train", "training", "sample_weight")


def unread_cure(name: str, known: Iterable[str]) -> str | None:
    """What to do about a column that is not read and may change what is learned; else None.

    Args:
        known: the columns of the formats that the rows have.
    """
    if name in _UNREAD_WEIGHTS:
        return (
            "rows are learned alike; mark messages (weight: 0), or give a source a weight in "
            "data.train"
        )
    if name == "label":
        return "to learn classes, set lora.task_type to SEQ_CLS"
    for meaning, reason in _UNREAD.items():
        if not means(name, meaning):
            continue
        if meaning == "context" and {"question", "prompt"} & set(known):
            return (
                f"{reason}; to show it, name the columns as in {as_yaml(_ALPACA | {'input': name})}"
            )
        if meaning in known and name != meaning:
            return f"{reason}; to use it, add {meaning}: {_quoted(name)} to data.columns"
        return f"{reason}; to use it, write it into the messages"
    return None


_ALPACA = {"instruction": "YOUR_QUESTIONS", "input": "", "output": "YOUR_ANSWERS"}


def as_yaml(columns: Mapping[str, str]) -> str:
    """`{prompt: mr, completion: "the answer"}`, as a recipe takes it."""
    return f"{{{', '.join(f'{name}: {_quoted(own)}' for name, own in columns.items())}}}"


def _quoted(name: str) -> str:
    plain = _BARE.fullmatch(name) and name.lower() not in _YAML_WORDS
    return name if plain else json.dumps(name, ensure_ascii=False)


def named_for(names: Iterable[str], meaning: str) -> list[str]:
    """Those of the names that can hold a `meaning`."""
    return [name for name in names if means(name, meaning)]


def beside(values: Mapping[str, object], meanings: Iterable[str]) -> dict[str, str]:
    """The one column for each of the meanings, of those that have just one."""
    found = {}
    for meaning in meanings:
        names = [n for n in named_for(values, meaning) if isinstance(values[n], (str, list))]
        if len(names) == 1:
            found[meaning] = names[0]
    return found
