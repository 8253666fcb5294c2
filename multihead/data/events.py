"""What the columns of an event log hold (who, what, when), and which is which where a file has no header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

USER_NAMES = ("user", "line", "userId", "uid", "customer", "customerId", "visitor", "visitorId", "member", "memberId",
              "reviewerID", "account", "client", "session", "sessionId", "用户", "用户ID", "用户编号", "客户", "客户ID",
              "会员", "会员ID", "买家", "会话")
ITEM_NAMES = ("item", "itemId", "iid", "movieId", "movie", "productId", "product", "sku", "skuId", "asin", "goods",
              "goodsId", "videoId", "video", "newsId", "articleId", "article", "songId", "track", "trackId", "items",
              "history", "sequence", "物品", "物品ID", "商品", "商品ID", "商品编号", "产品", "电影", "视频", "文章",
              "歌曲")
TIME_NAMES = ("time", "timestamp", "ts", "date", "datetime", "created_at", "unixReviewTime", "event_time",
              "click_time", "时间", "时间戳", "日期", "点击时间", "购买时间", "行为时间")
RATING_NAMES = ("rating", "score", "stars", "overall", "评分", "分数", "打分", "星级")

_DATE = re.compile(r"\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}")
_PARTS = re.compile(r"\d+")
_EARLIEST = 3e8
"""A number below it is no time in seconds of any log there is (1979), and may be a count or an id."""


def ids_of(value: Any) -> list[Any] | None:
    """The ids that a cell names: a list, also written as JSON, or one id. None: something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return [value]  # an id may begin with a bracket
        return found if isinstance(found, list) else [value]
    if isinstance(value, (list, tuple)):
        return list(value)
    return None if isinstance(value, dict) else [value]


def seconds(value: Any) -> float | None:
    """A moment as a number: seconds since 1970 (UTC where no zone is given) for a date, a number as it stands."""
    if isinstance(value, bool):
        return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    try:
        number = float(value)
        return number if abs(number) < float("inf") else None
    except (TypeError, ValueError, OverflowError):
        pass
    text = str(value).strip()
    try:
        return seconds(datetime.fromisoformat(text))
    except ValueError:
        pass
    if not _DATE.match(text):
        return None
    try:
        return seconds(datetime(*(int(part) for part in _PARTS.findall(text)[:6])))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def guess_log(header: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """user, item, time and rating → columns of a table without a header, as far as they can be told apart.

    The first column whose values are all moments is the time; of the others the first two are user and item, and a
    column of numbers behind them is the rating: the order of every public log (MovieLens, Amazon, Yelp).
    """
    values = {name: [row.get(name) for row in sample if row.get(name) not in (None, "")] for name in header}
    time = next((name for name in header[2:] if values[name] and all(map(_moment, values[name]))), None)
    rest = [name for name in header if name != time]
    found = dict(zip(("user", "item"), rest, strict=False))
    if time is not None:
        found["time"] = time
    rated = [name for name in rest[2:] if values[name] and all(map(_small, values[name]))]
    return found | ({"rating": rated[0]} if rated else {})


def _moment(value: Any) -> bool:
    found = seconds(value)
    return found is not None and (found >= _EARLIEST or bool(_DATE.match(str(value))))


def _small(value: Any) -> bool:
    try:
        return abs(float(value)) <= 1000
    except (TypeError, ValueError):
        return False
