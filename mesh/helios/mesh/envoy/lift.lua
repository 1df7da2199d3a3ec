-- Reads the fields that Envoy lifts from a JSON body (filters.lift) without keeping anything else of it. Envoy's parser,
-- json_to_metadata, makes an object of each value and takes some 100 instructions for a byte; here the texts of a prompt
-- are looked through for their end, by memchr.
--
-- What is read is what a parser reads. Where anything is out of the ordinary (a wanted field twice, an escape in a name, a
-- value that is neither a text of plain ASCII nor a number), nothing is lifted, and the filter behind this one parses the
-- body; so it is where a parser would refuse it, but for what is wrong within a text (an escape that there is not, bytes
-- that are no UTF-8, a control character but for a line feed), which is for whoever answers the request to say.
--
-- WANTED, the list of names, and METADATA_NAMESPACE are put in front of this file by filters.py.

local byte, find, match, sub = string.byte, string.find, string.match, string.sub

local TAB, LINE_FEED, RETURN, SPACE = 9, 10, 13, 32
local QUOTE, PLUS, COMMA, MINUS, POINT, ZERO, NINE, COLON = 34, 43, 44, 45, 46, 48, 57, 58
local LARGE_E, OPEN_LIST, BACKSLASH, CLOSE_LIST = 69, 91, 92, 93
local SMALL_E, SMALL_F, SMALL_N, SMALL_T, OPEN_OBJECT, CLOSE_OBJECT = 101, 102, 110, 116, 123, 125
-- Envoy's only thread does nothing else meanwhile: 30 ms at most for so many bytes, 3 ms for so many short values.
local MAX_BYTES, MAX_VALUES = 4 * 1024 * 1024, 10000
-- Ordinary requests have a dozen fields, and messages are nested five deep.
local MAX_FIELDS, MAX_DEPTH = 256, 64
-- Names of models have at most 200 bytes or so; a number of 15 digits is exact in Lua.
local MAX_VALUE_BYTES, MAX_DIGITS = 256, 15

local is_wanted = {}
for _, name in ipairs(WANTED) do is_wanted[name] = true end
-- Of the body that is read: the next line feed, as far as it was looked for (a text has none), and how many values.
local line_feed, value_count

-- The next place that is no white space, and what is there.
local function skip_space(text, at)
  local here = byte(text, at)
  while here == SPACE or here == LINE_FEED or here == RETURN or here == TAB do
    at = at + 1
    here = byte(text, at)
  end
  return at, here
end

-- These return where what begins at a place ends, or nothing.

local function end_of_text(text, at)
  local first = at
  while true do
    at = find(text, '"', at + 1, true)
    if not at then return nil end
    local before = at - 1
    while byte(text, before) == BACKSLASH do before = before - 1 end
    if (at - before) % 2 == 1 then break end
  end
  if line_feed < first then line_feed = find(text, "\n", first, true) or #text + 1 end
  return line_feed > at and at or nil
end

local function end_of_digits(text, at)
  local first, here = at, byte(text, at)
  while here and here >= ZERO and here <= NINE do
    at = at + 1
    here = byte(text, at)
  end
  return at > first and at - 1 or nil
end

local function end_of_number(text, at)
  if byte(text, at) == MINUS then at = at + 1 end
  local last = byte(text, at) == ZERO and at or end_of_digits(text, at)
  if last and byte(text, last + 1) == POINT then last = end_of_digits(text, last + 2) end
  local here = last and byte(text, last + 1)
  if here ~= SMALL_E and here ~= LARGE_E then return last end
  here = byte(text, last + 2)
  return end_of_digits(text, last + ((here == PLUS or here == MINUS) and 3 or 2))
end

local function end_of_word(text, at, word)
  local last = at + #word - 1
  return sub(text, at, last) == word and last or nil
end

local end_of_nested

local function end_of_value(text, at, here, depth)
  value_count = value_count + 1
  if value_count > MAX_VALUES then return nil end
  if here == QUOTE then return end_of_text(text, at) end
  if here == OPEN_LIST or here == OPEN_OBJECT then return depth > 0 and end_of_nested(text, at, here, depth - 1) or nil end
  if here == SMALL_T then return end_of_word(text, at, "true") end
  if here == SMALL_F then return end_of_word(text, at, "false") end
  if here == SMALL_N then return end_of_word(text, at, "null") end
  return end_of_number(text, at)
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

-- Of an object whose own fields are wanted, they go to `found`.
function end_of_nested(text, at, opening, depth, found)
  local closing, count = opening + 2, 0
  local name, last, here
  at, here = skip_space(text, at + 1)
  if here == closing then return at end
  while true do
    if opening == OPEN_OBJECT then
      last = here == QUOTE and end_of_text(text, at)
      if not last then return nil end
      if found then
        name, count = sub(text, at + 1, last - 1), count + 1
        if count > MAX_FIELDS or find(name, "\\", 1, true) then return nil end
      end
      at, here = skip_space(text, last + 1)
      if here ~= COLON then return nil end
      at, here = skip_space(text, at + 1)
    end
    last = end_of_value(text, at, here, depth)
    if not last then return nil end
    if found and is_wanted[name] then
      local value = value_of(text, at, last)
      if not value or found[name] then return nil end
      found[name] = value
    end
    at, here = skip_space(text, last + 1)
    if here == closing then return at end
    if here ~= COMMA then return nil end
    at, here = skip_space(text, at + 1)
  end
end

local function read(text)
  line_feed, value_count = 0, 0
  local found = {}
  local at, here = skip_space(text, 1)
  local last = here == OPEN_OBJECT and end_of_nested(text, at, here, MAX_DEPTH, found)
  if not last or skip_space(text, last + 1) <= #text then return nil end
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
