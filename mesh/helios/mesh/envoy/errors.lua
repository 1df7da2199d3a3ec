-- The error filter: REST callers get OpenAI's error body for every error, whoever made it. Native gRPC always has
-- :status 200 and is never touched. METHODS (path -> methods), MAX_BODY_BYTES and NOT_FOR_REST (names of headers) are put
-- in front of this file by rest.py. Two filters run it, one for requests and one for responses, so that each is left out
-- where it has nothing to do (filters.py).
--
-- Where the message comes from, in this order: the header x-openai-error (a complete body in ASCII, made by a server of the
-- mesh), the transcoder's {"code":5,"message":...,"details":[...]}, the plain text of Envoy's own replies.
--
-- Every handle that was taken before body() is dead afterwards (body() yields): headers() is called again.

local JSON = "application/json"
-- Namespace of what this filter remembers of a request until its answer.
local STATE = "helios.errors"

-- Status -> type and code of the error, and a message for people where Envoy's own says nothing to them.
local KINDS = {
  ["400"] = {"invalid_request_error", "invalid_request"},
  ["401"] = {"authentication_error", "unauthenticated", "A valid token is required: send the header `Authorization: Bearer <token>`."},
  ["403"] = {"permission_error", "permission_denied", "This request is refused here."},
  ["404"] = {"invalid_request_error", "unknown_url"},
  ["405"] = {"invalid_request_error", "method_not_allowed"},
  ["408"] = {"timeout_error", "request_timeout", "The request took too long to arrive."},
  ["409"] = {"conflict_error", "conflict"},
  ["413"] = {"invalid_request_error", "request_too_large", "The request body is larger than this server takes."},
  ["415"] = {"invalid_request_error", "unsupported_media_type"},
  ["429"] = {"rate_limit_error", "rate_limited"},
  ["431"] = {"invalid_request_error", "headers_too_large", "The request's headers are larger than this server takes."},
  ["501"] = {"server_error", "unsupported"},
  ["503"] = {"server_error", "unavailable"},
  ["504"] = {"timeout_error", "timeout"},
}
local CLIENT_ERROR = {"invalid_request_error", "invalid_request"}
local SERVER_ERROR = {"server_error", "internal_error"}

-- Beginnings of Envoy's own texts -> what people should read.
local PLAIN = {
  {"RBAC: access denied", "This request is refused here: the Host or Origin header is not this listener's own."},
  {"upstream connect error", "The server could not be reached, or was lost before it answered; try again."},
  {"no healthy upstream", "The replica that was picked is gone; try again."},
  {"stream timeout", "The request took too long."},
  {"Could not resolve", "Unknown URL: no such path with this method."},
  {"no such path or method", "Unknown URL: no such path with this method."},
  {"ext_proc", "The endpoint picker could not be reached; try again."},
}

local ESCAPES = {['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t"}

local function quote(text)
  text = string.gsub(text, '[%z\1-\31"\\\127]', function(char)
    return ESCAPES[char] or string.format("\\u%04x", string.byte(char))
  end)
  return '"' .. text .. '"'
end

-- The raw JSON string (without quotes) of a key in the transcoder's status, or nil.
local function json_string(document, key)
  local _, from = string.find(document, '"' .. key .. '":%s*"')
  if not from then return nil end
  local at = from + 1
  while at <= #document do
    local char = string.sub(document, at, at)
    if char == "\\" then
      at = at + 2
    elseif char == '"' then
      return string.sub(document, from + 1, at - 1)
    else
      at = at + 1
    end
  end
  return nil
end

-- quoted_message and quoted_code are JSON strings already, quotes included.
local function openai_body(kind, quoted_message, quoted_code)
  return '{"error":{"message":' .. quoted_message .. ',"type":"' .. kind .. '","param":null,"code":' .. quoted_code .. "}}"
end

local function plain_message(status, text)
  for _, row in ipairs(PLAIN) do
    if string.sub(text, 1, #row[1]) == row[1] then return row[2] end
  end
  local kind = KINDS[status]
  if kind and kind[3] then return kind[3] end
  if text ~= "" then return text end
  return "The request failed with HTTP status " .. status .. "."
end

local function shape(status, content_type, body)
  local kind = KINDS[status] or (tonumber(status) < 500 and CLIENT_ERROR or SERVER_ERROR)
  if string.sub(body, 1, 9) == '{"error":' then return body end
  if string.find(content_type, JSON, 1, true) then
    local message = json_string(body, "message")
    if message then
      local reason = json_string(body, "reason")
      return openai_body(kind[1], '"' .. message .. '"', reason and '"' .. string.lower(reason) .. '"' or quote(kind[2]))
    end
  end
  return openai_body(kind[1], quote(plain_message(status, body)), quote(kind[2]))
end

local function is_grpc(content_type)
  return content_type ~= nil and string.sub(content_type, 1, 16) == "application/grpc"
end

local function refuse(handle, status, message, extra)
  local headers = {[":status"] = status, ["content-type"] = JSON}
  for name, value in pairs(extra or {}) do headers[name] = value end
  handle:respond(headers, openai_body(KINDS[status][1], quote(message), quote(KINDS[status][2])))
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local method = headers:get(":method")
  local content_type = headers:get("content-type")
  if is_grpc(content_type) or method == "OPTIONS" then return end
  local path = string.match(headers:get(":path") or "", "^[^?#]*")
  if method == "HEAD" then handle:streamInfo():dynamicMetadata():set(STATE, "is_head", true) end
  local allowed = METHODS[path]
  if allowed and not string.find(", " .. allowed .. ",", ", " .. method .. ",", 1, true) then
    refuse(handle, "405", method .. " is not allowed on " .. path .. "; use " .. allowed .. ".", {["allow"] = allowed})
    return
  end
  if method ~= "POST" and method ~= "PUT" and method ~= "PATCH" then return end
  local lower = content_type and string.lower(content_type) or JSON
  if not string.match(lower, "^application/json%s*$") and not string.match(lower, "^application/json%s*;") then
    refuse(handle, "415", "The body must be JSON: send `Content-Type: application/json`, not `" .. content_type .. "`.")
    return
  end
  local encoding = headers:get("content-encoding")
  if encoding and string.lower(encoding) ~= "identity" then
    refuse(handle, "415", "The body must not be encoded: send it without `Content-Encoding: " .. encoding .. "`.")
    return
  end
  -- get() returns no value at all, rather than nil, for a header that is not there.
  local announced = tonumber(headers:get("content-length") or "")
  if announced and announced <= MAX_BODY_BYTES then return end
  -- A body that is too large is read to its end (up to Envoy's own limit, twice this one) before it is refused: an answer
  -- in the middle of an upload closes the connection under it, and asyncio clients then lose the answer.
  local body = handle:body()
  if body and body:length() > MAX_BODY_BYTES then
    refuse(handle, "413", "The request body is larger than " .. MAX_BODY_BYTES .. " bytes.")
  end
end

-- An answer to HEAD has no body. One that is put in would be read as the beginning of the connection's next answer.
-- Envoy's own replies announce the body that they leave out, also where an earlier filter refused the request.
local function is_for_head(handle, headers, size)
  local state = handle:streamInfo():dynamicMetadata():get(STATE)
  if state and state["is_head"] then return true end
  return size == 0 and (tonumber(headers:get("content-length") or "0") or 0) > 0
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local content_type = headers:get("content-type") or ""
  if is_grpc(content_type) then return end
  local status = headers:get(":status") or "500"
  local ready_made = headers:get("x-openai-error")
  for _, name in ipairs(NOT_FOR_REST) do headers:remove(name) end
  if tonumber(status) < 400 then return end

  local buffer = handle:body(true)
  local size = buffer:length()
  if is_for_head(handle, handle:headers(), size) then return end
  local body = size > 0 and buffer:getBytes(0, size) or ""
  local shaped = ready_made or shape(status, content_type, body)
  buffer:setBytes(shaped)
  headers = handle:headers()
  headers:replace("content-type", JSON)
  headers:replace("content-length", tostring(#shaped))
  headers:remove("x-content-type-options")
  if status == "503" and not headers:get("retry-after") then headers:replace("retry-after", "1") end
end
