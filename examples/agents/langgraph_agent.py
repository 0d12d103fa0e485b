"""An agent with a shell as a LangGraph: one question, and its last words are the answer.

    langgraph_agent.py "How many files are here?"

Environment: OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL ("policy").
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

COMMAND_S = 30.0


@tool
def shell(command: str) -> str:
    """Runs a shell command in the current folder."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    return f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


def main(question: str) -> None:
    model = ChatOpenAI(model=os.environ.get("OPENAI_MODEL", "policy")).bind_tools([shell])

    def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_node("tools", ToolNode([shell]))
    graph.add_edge(START, "ask")
    graph.add_conditional_edges("ask", tools_condition)
    graph.add_edge("tools", "ask")
    asked = [("system", "Do what is asked, with the shell."), ("user", question)]
    print(graph.compile().invoke({"messages": asked}, {"recursion_limit": 40})["messages"][-1].content)


if __name__ == "__main__":
    main(sys.argv[1])
