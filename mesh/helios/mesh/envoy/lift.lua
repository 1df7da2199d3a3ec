-- Reads the fields that Envoy lifts from a JSON body (filters.lift) without a parser: the names of an object's own
-- fields one after another, over whatever is between them. Envoy's parser, json_to_metadata, makes an object of each value
-- and takes some 100 instructions for a byte; here the texts of a prompt are looked through for their end, by memchr.
--
-- What is read is what a parser reads, and what a parser would refuse may be read here: whoever answers the request parses
-- it. Where anything is out of the ordinary (a field twice, an escape in a name or a value, what is neither a text of plain
-- ASCII nor a number), nothing is lifted, and the filter behind this one parses the body.
--
-- WANTED, the list of names, and METADATA_NAMESPACE are put in front of this file by filters.py.

local byte, find, match, sub = string.byte, string.find, string.match, string.sub

local TAB, LINE_FEED, RETURN, SPACE = 9, 10, 13, 32
local QUOTE, COMMA, COLON, BACKSLASH = 34, 44, 58, 92
-- What is closed comes two after what opens it.
local OPEN_LIST, CLOSE_LIST, OPEN_OBJECT, CLOSE_OBJECT = 91, 93, 123, 125
-- A body is copied to be read.
local MAX_BYTES = 4 * 1024 * 1024
local MAX_DEPTH, MAX_VALUE_BYTES, MAX_DIGITS = 64, 256, 15
local WORDS = {["true"] = true, ["false"] = true, ["null"] = true}

local is_wanted = {}
for _, name in ipairs(WANTED) do is_wanted[name] = true end
local closers = {}

-- The next place that is no white space, and what is there.
local function skip_space(text, at)
  local found = byte(text, at)
  while found == SPACE or found == LINE_FEED or found == RETURN or found == TAB do
    at = at + 1
    found = byte(text, at)
  end
  return at, found
end

-- These return where what begins at a place ends, or nothing.

local function end_of_text(text, at)
  while true do
    at = find(text, '"', at + 1, true)
    if not at then return nil end
    local before = at - 1
    while byte(text, before) == BACKSLASH do before = before - 1 end
    if (at - before) % 2 == 1 then return at end
  end
end

local function end_of_nested(text, at)
  local depth = 0
  while true do
    local found = byte(text, at)
    if found == QUOTE then
      at = end_of_text(text, at)
      if not at then return nil end
    elseif found == OPEN_LIST or found == OPEN_OBJECT then
      depth = depth + 1
      if depth > MAX_DEPTH then return nil end
      closers[depth] = found + 2
    elseif found == CLOSE_LIST or found == CLOSE_OBJECT then
      if closers[depth] ~= found then return nil end
      depth = depth - 1
      if depth == 0 then return at end
    elseif not found then
      return nil
    end
    at = at + 1
  end
end

local function end_of_scalar(text, at)
  local _, last = find(text, "^[%w.+-]+", at)
  if not last then return nil end
  local scalar = sub(text, at, last)
  if WORDS[scalar] or find(scalar, "^-?%d") then return last end
  return nil
end

-- What is lifted of a value; nothing where that is a parser's to say.
local function value_of(text, first, last)
  if byte(text, first) == QUOTE then
    if last - first - 1 > MAX_VALUE_BYTES then return nil end
    local value = match(sub(text, first + 1, last - 1), "^[ -~]+$")
    return value and not find(value, "\\", 1, true) and value
  end
  if last - first >= MAX_DIGITS then return nil end
  local number = sub(text, first, last)
  return match(number, "^[1-9]%d*$") and tonumber(number)
end

local function read(text)
  local found = {}
  local at, here = skip_space(text, 1)
  if here ~= OPEN_OBJECT then return nil end
  repeat
    at, here = skip_space(text, at + 1)
    if here ~= QUOTE then return nil end
    local last = end_of_text(text, at)
    if not last then return nil end
    local name = sub(text, at + 1, last - 1)
    if find(name, "\\", 1, true) then return nil end
    at, here = skip_space(text, last + 1)
    if here ~= COLON then return nil end
    at, here = skip_space(text, at + 1)
    if here == QUOTE then last = end_of_text(text, at)
    elseif here == OPEN_LIST or here == OPEN_OBJECT then last = end_of_nested(text, at)
    else last = end_of_scalar(text, at) end
    if not last then return nil end
    if is_wanted[name] then
      local value = value_of(text, at, last)
      if not value or found[name] then return nil end
      found[name] = value
    end
    at, here = skip_space(text, last + 1)
  until here ~= COMMA
  if here ~= CLOSE_OBJECT or skip_space(text, at + 1) <= #text then return nil end
  return found
end

function envoy_on_request(handle)
  local body = handle:body()
  local size = body and body:length() or 0
  if size == 0 or size > MAX_BYTES then return end
  local found = read(body:getBytes(0, size))
  -- By the model the other filter knows that there is nothing left to do.
  if not found or not found.model then return end
  local metadata = handle:streamInfo():dynamicMetadata()
  for _, name in ipairs(WANTED) do
    if found[name] then metadata:set(METADATA_NAMESPACE, name, found[name]) end
  end
end
