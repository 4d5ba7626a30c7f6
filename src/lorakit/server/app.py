"""The application: every route, with the description that clients and tests read (OpenAPI)."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lorakit.engine.engine import Engine
from lorakit.server import errors, guarded_routes, page
from lorakit.server.adapters import Shelf
from lorakit.server.chat import chat
from lorakit.server.classifying import ClassifyRequest, classify
from lorakit.server.completions import complete
from lorakit.server.embeddings import EmbeddingRequest, embed
from lorakit.server.errors import ApiError
from lorakit.server.fair_turns import Turns
from lorakit.server.gate import Gate, Hosts
from lorakit.server.guarded_routes import Guard, Level, needs
from lorakit.server.images import Images
from lorakit.server.keys import Keys, caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.options import ServerOptions
from lorakit.server.payloads import (
    ChatRequest,
    CompletionRequest,
    LoadAdapterRequest,
    PoolingRequest,
    UnloadAdapterRequest,
)
from lorakit.server.pooling import pool
from lorakit.server.prometheus import CONTENT_TYPE, Metrics
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.ranking import RerankRequest, ScoreRequest, rerank, score
from lorakit.server.replies import (
    ChatCompletion,
    Classification,
    Completion,
    Detokenized,
    Embeddings,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    Pooling,
    Reranked,
    ResponseReply,
    Scores,
    Tokens,
)
from lorakit.server.response_payloads import ResponsesRequest
from lorakit.server.responses import Conversations, respond_to
from lorakit.server.tokenizing import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from lorakit.version import __version__

_REASONS = {
    400: "The request cannot be answered as it is.",
    401: "The key is missing or wrong.",
    403: "The key does not do, or the server was not started for this.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too much is under way: ask again after the seconds in Retry-After.",
    500: "The answer failed, and no other one with it.",
    503: "The server ends, or the engine has stopped.",
}

_STREAMED = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"data": {"type": "string", "description": "A chunk, or [DONE]."}},
            "required": ["data"],
        }
    }
}


def create_app(engine: Engine, options: ServerOptions) -> tuple[FastAPI, Desk]:
    """The application over `engine`, and the desk where its requests lie."""
    metrics = Metrics(engine)
    desk = Desk(engine, options.limits, metrics)
    prompts = Prompts(engine, Images(options.limits, options.fetch_from))
    shelf = Shelf(engine, options.adapter_root, images=options.limits.images > 0)
    app = FastAPI(
        title="lorakit serve",
        version=__version__,
        description="OpenAI's API over one base model and its adapters; `model` names the adapter.",
        openapi_url=None,  # a route below, as what FastAPI would add nothing guards
        redirect_slashes=False,
    )
    errors.install(app)
    app.state.training = None
    app.state.turns = Turns("lorakit-bodies")
    keys = app.state.keys = Keys(options.api_keys, options.admin_key)
    guarded_routes.install(app, Guard(desk, keys))
    hosts = Hosts(options.host, options.allowed_hosts, has_key=keys.asked_for)
    app.add_middleware(Gate, hosts=hosts, metrics=metrics)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=_of_answers(),
        dependencies=needs(Level.API_KEY),
    )
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """The model's turn in a conversation."""
        return await chat(request, asked, desk, prompts)

    conversations = Conversations()

    @app.post(
        "/v1/responses",
        response_model=ResponseReply,
        responses=_of_answers(),
        dependencies=needs(Level.API_KEY),
    )
    async def responses(request: Request, asked: ResponsesRequest) -> Response:
        """The model's turn behind some items."""
        return await respond_to(request, asked, desk, prompts, conversations)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=_of_answers(),
        dependencies=needs(Level.API_KEY),
    )
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """How the model goes on from a text."""
        return await complete(request, asked, desk, prompts)

    @app.post(
        "/pooling",
        response_model=Pooling,
        responses=_of_pooled(),
        dependencies=needs(Level.API_KEY),
    )
    async def pooling(request: Request, asked: PoolingRequest) -> Response:
        """What a model without text of its own gives to texts or to a conversation."""
        return await pool(request, asked, desk, prompts)

    @app.post(
        "/v1/embeddings",
        response_model=Embeddings,
        responses=_of_pooled(),
        dependencies=needs(Level.API_KEY),
    )
    async def embeddings(request: Request, asked: EmbeddingRequest) -> Response:
        """What the model makes of texts, as numbers."""
        return await embed(request, asked, desk, prompts)

    for path in ("/classify", "/v1/classify"):

        @app.post(
            path,
            response_model=Classification,
            responses=_of_pooled(),
            dependencies=needs(Level.API_KEY),
        )
        async def labels(request: Request, asked: ClassifyRequest) -> Response:
            """Which of its labels a classifier gives to texts."""
            return await classify(request, asked, desk, prompts)

    for path in ("/v1/score", "/score"):

        @app.post(
            path,
            response_model=Scores,
            responses=_of_pooled(),
            dependencies=needs(Level.API_KEY),
        )
        async def scores(request: Request, asked: ScoreRequest) -> Response:
            """How well texts go with others."""
            return await score(request, asked, desk, prompts)

    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):

        @app.post(
            path,
            response_model=Reranked,
            responses=_of_pooled(),
            dependencies=needs(Level.API_KEY),
        )
        async def reranked(request: Request, asked: RerankRequest) -> Response:
            """Documents, sorted by how well they go with a query."""
            return await rerank(request, asked, desk, prompts)

    @app.post(
        "/tokenize",
        response_model=Tokens,
        responses=_errors(400, 401, 404, 408, 413, 429, 503),
        dependencies=needs(Level.API_KEY),
    )
    async def tokens(request: Request, asked: TokenizeRequest) -> JSONResponse:
        """The tokens of a text or a conversation."""
        return JSONResponse(await tokenize(request, asked, desk, prompts))

    @app.post(
        "/detokenize",
        response_model=Detokenized,
        responses=_errors(400, 401, 404, 408, 413, 429, 503),
        dependencies=needs(Level.API_KEY),
    )
    async def text(request: Request, asked: DetokenizeRequest) -> JSONResponse:
        """The text of tokens."""
        return JSONResponse(await detokenize(request, asked, desk))

    @app.get("/v1/models", responses=_errors(401, 429, 503), dependencies=needs(Level.API_KEY))
    async def models(request: Request) -> ModelList:
        """The base and its adapters."""
        return shelf.models(caller_of(request))

    @app.get(
        "/v1/models/{model:path}",
        responses=_errors(401, 404, 429, 503),
        dependencies=needs(Level.API_KEY),
    )
    async def model(request: Request, model: str) -> ModelCard:
        """One of them."""
        return shelf.model(model, caller_of(request))

    @app.post(
        "/v1/load_lora_adapter",
        response_class=PlainTextResponse,
        responses=_errors(400, 401, 403, 408, 413, 429, 503, beside_text=True),
        dependencies=needs(Level.ADMIN_KEY),
    )
    async def load_lora_adapter(asked: LoadAdapterRequest) -> PlainTextResponse:
        """Serve one more adapter, or a new version of one."""
        return PlainTextResponse(await shelf.load(asked))

    @app.post(
        "/v1/unload_lora_adapter",
        response_class=PlainTextResponse,
        responses=_errors(400, 401, 403, 404, 408, 413, 429, 503, beside_text=True),
        dependencies=needs(Level.ADMIN_KEY),
    )
    async def unload_lora_adapter(asked: UnloadAdapterRequest) -> PlainTextResponse:
        """Serve an adapter no longer."""
        return PlainTextResponse(await shelf.unload(asked))

    @app.get(
        "/health",
        response_model=Health,
        responses=_errors(503),
        dependencies=needs(Level.ANYONE, when_busy=True, when_ending=True),
    )
    async def health() -> JSONResponse:
        """Whether the server takes requests."""
        if desk.draining:
            raise ApiError(503, "the server ends", code="shutdown")
        if not engine.alive():
            raise ApiError(503, "the engine has stopped: start the server again", code="stopped")
        return JSONResponse({"status": "ok"})

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_errors(401, beside_text=True),
        dependencies=needs(Level.API_KEY, when_busy=True, when_ending=True),
    )
    async def figures(request: Request) -> Response:
        """What the server counts, for Prometheus."""
        text = metrics.page()
        if app.state.training is not None:
            text += app.state.training.figures.page(caller_of(request))
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @app.get("/openapi.json", include_in_schema=False, dependencies=needs(Level.API_KEY))
    async def description() -> JSONResponse:
        return JSONResponse(app.openapi())

    if options.training_state is not None:
        from lorakit.server.training.routes import TrainingRoutes
        from lorakit.server.training.service import TrainingService

        state, most = options.training_state, options.training_limits
        service = TrainingService(engine, state, most, keys.label)
        app.state.training = TrainingRoutes(app, service, everyone=not keys.asked_for)
        desk.find = service.offer
    page.install(app, training=options.training_state is not None)
    return app, desk


def _of_answers() -> dict[int | str, dict[str, Any]]:
    return {200: {"content": _STREAMED}, **_errors(400, 401, 404, 408, 413, 429, 500, 503)}


def _of_pooled() -> dict[int | str, dict[str, Any]]:
    return _errors(400, 401, 404, 408, 413, 429, 500, 503)


def _errors(*statuses: int, beside_text: bool = False) -> dict[int | str, dict[str, Any]]:
    form: dict[str, Any] = {"model": ErrorReply}
    if beside_text:  # FastAPI would give the errors of such a route the type of its text
        schema = {"$ref": f"#/components/schemas/{ErrorReply.__name__}"}
        form = {"content": {"application/json": {"schema": schema}}}
    # "4XX" also keeps FastAPI from adding its own 422, which is never sent here.
    replies: dict[int | str, dict[str, Any]] = {"4XX": {**form, "description": "Refused."}}
    for status in statuses:
        replies[status] = {**form, "description": _REASONS[status]}
    return replies
