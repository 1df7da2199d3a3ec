-- The lane's picker: requests of a model with several replicas are sent to one of them without the proxy being asked.
-- The express lane (helios.mesh.xds.express) names the model in a header; how to pick among its replicas the proxy says
-- in each answer to LaneService.Renew (proto/helios/api/proxy/v1/lane_service.proto, which has the formula), for half a
-- second. One request in a tenth of a second asks for it, and tells what was picked since. Where nothing valid is known,
-- the request goes on as it came, and Envoy asks the proxy about it alone.
--
-- RENEW_PATH, PICKER (its cluster), and the names of headers are put in front of this file by filters.py. Each of
-- Envoy's worker threads has a state of its own; Helios runs Envoy with one.
--
-- Every handle that was taken before body() or httpCall() is dead afterwards (they yield): headers() is called again.

local ffi = require("ffi")
local bit = require("bit")
local band, bor, bnot, bxor, lshift, rshift = bit.band, bit.bor, bit.bnot, bit.bxor, bit.lshift, bit.rshift
local byte, char, find, floor, sub = string.byte, string.char, string.find, math.floor, string.sub

ffi.cdef([[
  typedef struct { long seconds; long nanoseconds; } helios_lane_time;
  int clock_gettime(int clock, helios_lane_time *time);
]])

local MONOTONIC = 1
local BLOCK_BYTES, BLOCK_WORDS = 256, 64
local MIN_BLOCKS, MAX_BLOCKS, COHORT_BLOCKS = 2, 400, 4
-- A renewal that takes longer has failed: the proxy answers within a millisecond.
local RENEW_SECONDS = 0.25
-- Picks that wait to be told, and their prompts' blocks; more are only counted. The proxy takes 15 ms for so many.
local MAX_PICKS, MAX_TOLD_BLOCKS = 512, 8192
-- Blocks known of a model, twice: what was not asked for while so many others were is forgotten.
local MAX_KNOWN = 65536
-- Names of models come from the proxy, which has few in the lane at a time; one takes 7 MB at most.
local MAX_MODELS = 32
local MAX_SLOTS = 32

local models, model_count = {}, 0
local time = ffi.new("helios_lane_time")

local function clock()
  ffi.C.clock_gettime(MONOTONIC, time)
  return tonumber(time.seconds) + tonumber(time.nanoseconds) / 1e9
end

-- Protobuf, as far as these messages need it.

local VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
local ANSWER_KINDS = {
  VARINT, VARINT, BYTES, FIXED64, BYTES, VARINT, FIXED64, FIXED64, VARINT, FIXED64, BYTES, VARINT, VARINT, FIXED64,
}
local CANDIDATE_KINDS = {BYTES, BYTES, FIXED64, VARINT, VARINT}
local LOSS_KINDS = {BYTES, BYTES}
local scratch = ffi.new("double[1]")

local function varint(value)
  if value < 128 then return char(value) end
  local out = ""
  while value >= 128 do
    out = out .. char(value % 128 + 128)
    value = floor(value / 128)
  end
  return out .. char(value)
end

local function uint_field(number, value) return char(number * 8) .. varint(value) end

local function double_field(number, value)
  scratch[0] = value
  return char(number * 8 + 1) .. ffi.string(scratch, 8)
end

local function bytes_field(number, value) return char(number * 8 + 2) .. varint(#value) .. value end

local function read_varint(text, at)
  local value, scale = 0, 1
  for place = at, at + 9 do
    local part = byte(text, place)
    if not part then break end
    value = value + part % 128 * scale
    if part < 128 then return value, place + 1 end
    scale = scale * 128
  end
  error("a number has no end")
end

local function read_double(eight) return ffi.cast("const double *", eight)[0] end

local function read_fixed(eight) return ffi.cast("const uint64_t *", eight)[0] end

-- Calls `take(number, value)` for each field that is of the kind that `kinds` has for it: with a number, or with its bytes.
-- Other fields are not known here. Raises an error where bytes are no message.
local function read_message(text, kinds, take)
  local at, size = 1, #text
  while at <= size do
    local tag, value, length
    tag, at = read_varint(text, at)
    local number, kind = floor(tag / 8), tag % 8
    if kind == VARINT then
      value, at = read_varint(text, at)
    else
      if kind == BYTES then length, at = read_varint(text, at)
      elseif kind == FIXED64 then length = 8
      elseif kind == FIXED32 then length = 4
      else error("a field is of no known kind") end
      if length > size - at + 1 then error("a message ends early") end
      value, at = sub(text, at, at + length - 1), at + length
    end
    if kinds[number] == kind then take(number, value) end
  end
end

-- Prompts. A block's hash is made of its bytes and the hash before, so that equal hashes mean equal beginnings: the sum of
-- its words, each times a secret (Source: Lemire and Kaser, Strongly Universal String Hashing is Fast), so that whoever
-- does not know the secrets finds no two blocks that collide.

local prompt = ffi.new("uint32_t[?]", MAX_BLOCKS * BLOCK_WORDS)
-- The hashes of the request that is looked at, as they are sent and as they are looked up.
local hashes, chain = ffi.new("uint64_t[?]", MAX_BLOCKS), {}

-- The secrets of a seed (Source: Vigna, SplitMix64): one for each word, and one for the hash before, an odd one, of which
-- no power is 0.
local function make_secrets(seed)
  local secrets = ffi.new("uint64_t[?]", BLOCK_WORDS + 1)
  for place = 0, BLOCK_WORDS do
    seed = seed + 0x9E3779B97F4A7C15ULL
    local value = bxor(seed, rshift(seed, 30)) * 0xBF58476D1CE4E5B9ULL
    value = bxor(value, rshift(value, 27)) * 0x94D049BB133111EBULL
    secrets[place] = bxor(value, rshift(value, 31))
  end
  secrets[BLOCK_WORDS] = bor(secrets[BLOCK_WORDS], 1)
  return secrets
end

local function hash_block(value, secrets, first)
  value = value * secrets[BLOCK_WORDS]
  for place = 0, BLOCK_WORDS - 1 do value = value + secrets[place] * prompt[first + place] end
  return value
end

-- A text with the prompt, and where in it that begins: with tools, as in templates, then with messages; nothing where
-- there is none. What comes after it in the body (a temperature) differs only in the last block, or makes other tools of it.
-- A quote within a JSON text has a backslash before it, so these are found as keys, or as values by chance.
local function find_prompt(text)
  local messages = find(text, '"messages"', 1, true) or find(text, '"prompt"', 1, true)
  local tools = messages and find(text, '"tools"', 1, true)
  if not tools or tools < messages then return text, tools or messages end
  return sub(text, tools) .. sub(text, messages, tools - 1), 1
end

-- The hashes of a prompt's blocks into `hashes` and `chain`; how many there are.
local function hash_prompt(model, text, start)
  if not start then return 0 end
  local count = math.min(floor((#text - start + 1) / BLOCK_BYTES), MAX_BLOCKS)
  if count < MIN_BLOCKS then return 0 end
  ffi.copy(prompt, ffi.cast("const char *", text) + (start - 1), count * BLOCK_BYTES)
  local value, secrets = model.seed, model.secrets
  for number = 0, count - 1 do
    value = hash_block(value, secrets, number * BLOCK_WORDS)
    -- 53 bits, which a number of Lua holds. The first ones are the good ones.
    local key = rshift(value, 11)
    hashes[number] = key
    chain[number + 1] = tonumber(key)
  end
  return count
end

-- Which replicas have a block: a bit for each slot.
local function holders(model, key)
  local bits = model.known[key]
  if bits then return bits end
  bits = model.older[key]
  if not bits then return 0 end
  model.known[key] = bits
  model.known_count = model.known_count + 1
  return bits
end

local function learn(model, count, mine)
  local known = model.known
  for number = 1, count do
    local key = chain[number]
    local bits = known[key]
    if not bits then
      bits = model.older[key] or 0
      model.known_count = model.known_count + 1
    end
    known[key] = bor(bits, mine)
  end
  if model.known_count > MAX_KNOWN then
    model.older, model.known, model.known_count = known, {}, 0
  end
end

local function lose(known, key, keep)
  local bits = known[key]
  if bits then
    bits = band(bits, keep)
    known[key] = bits ~= 0 and bits or nil
  end
end

-- The replicas of the slots that are not in `keep` have nothing any more.
local function lose_all(model, keep)
  if keep == -1 then return end
  for key in pairs(model.known) do lose(model.known, key, keep) end
  for key in pairs(model.older) do lose(model.older, key, keep) end
end

local function forget(model)
  model.known, model.older, model.known_count = {}, {}, 0
end

-- Sessions. The ring is the proxy's own (helios/proxy/routing/sessions.py): the same key has the same home in both.

local POINTS = 16
local WORD = 0xFFFFFFFFULL
local remainders = ffi.new("uint32_t[256]")
for number = 0, 255 do
  local value = number
  for _ = 1, 8 do
    value = band(value, 1) == 1 and bxor(rshift(value, 1), 0xEDB88320) or rshift(value, 1)
  end
  remainders[number] = value % 4294967296
end

-- CRC-32, and the finalizer of MurmurHash3.
local function hash_key(text)
  local crc = -1
  for place = 1, #text do
    crc = bxor(rshift(crc, 8), remainders[band(bxor(crc, byte(text, place)), 255)])
  end
  local value = band(1ULL * (bnot(crc) % 4294967296), WORD)
  value = band(bxor(value, rshift(value, 16)) * 0x85EBCA6BULL, WORD)
  value = band(bxor(value, rshift(value, 13)) * 0xC2B2AE35ULL, WORD)
  return tonumber(bxor(value, rshift(value, 16)))
end

local function comes_before(one, other)
  if one[1] ~= other[1] then return one[1] < other[1] end
  return one[2] < other[2]
end

local function ring_of(candidates)
  local points = {}
  for _, candidate in ipairs(candidates) do
    for number = 0, POINTS - 1 do
      points[#points + 1] = {hash_key(candidate.replica_id .. " " .. number), candidate.replica_id}
    end
  end
  table.sort(points, comes_before)
  return points
end

-- The replica of the next point.
local function home_of(points, key)
  local value, low, high = hash_key(key), 1, #points + 1
  while low < high do
    local middle = floor((low + high) / 2)
    if points[middle][1] < value then low = middle + 1 else high = middle end
  end
  return points[low <= #points and low or 1][2]
end

-- What says that requests belong together, the narrowest first: a header, or fields of OpenAI's bodies.
local function session_of(headers, lifted)
  local key = headers:get(SESSION_HEADER)
  if key and key ~= "" then return key end
  for _, name in ipairs(SESSION_FIELDS) do
    key = lifted[name]
    if type(key) == "string" and key ~= "" then return key end
  end
  return nil
end

-- Leases.

-- Where there are too many, the one that was asked about longest ago is forgotten.
local function new_model(name)
  if model_count >= MAX_MODELS then
    local oldest
    for _, model in pairs(models) do
      if not oldest or model.asked_at < oldest.asked_at then oldest = model end
    end
    models[oldest.name], model_count = nil, model_count - 1
  end
  local model = {
    name = name, candidates = {}, slots = {}, picks = {}, pick_count = 0, block_count = 0, untold = 0, sequence = 0,
    ends_at = 0, renew_at = 0, asking_until = 0, asked_at = 0,
  }
  forget(model)
  models[name], model_count = model, model_count + 1
  return model
end

local function read_candidate(text)
  local found = {replica_id = "", address = "", fixed = 0, running = 0, room = nil, recent = 0}
  read_message(text, CANDIDATE_KINDS, function(number, value)
    if number == 1 then found.replica_id = value
    elseif number == 2 then found.address = value
    elseif number == 3 then found.fixed = read_double(value)
    elseif number == 4 then found.running = value
    elseif value > 0 then found.room = value - 1
    else found.room = nil
    end
  end)
  if found.replica_id == "" or found.address == "" then error("a candidate has no name or no address") end
  return found
end

local function read_loss(text)
  local found = {replica_id = "", blocks = ""}
  read_message(text, LOSS_KINDS, function(number, value)
    if number == 1 then found.replica_id = value else found.blocks = found.blocks .. value end
  end)
  if #found.blocks % 8 ~= 0 then error("a hash ends early") end
  return found
end

-- Reads a gRPC frame: whether it is compressed, its length, and the message.
local function read_answer(frame)
  local compressed, a, b, c, d = byte(frame, 1, 5)
  if compressed ~= 0 or not d or ((a * 256 + b) * 256 + c) * 256 + d ~= #frame - 5 then error("it is not one message") end
  local found = {
    lease = 0, renew = 0, revision = "", seed = 0ULL, candidates = {}, retries = 0, running_weight = 0, prefix_weight = 0,
    context = 0, per_byte = 0, losses = {}, sequence = 0, forgets = false, session_weight = 0,
  }
  read_message(sub(frame, 6), ANSWER_KINDS, function(number, value)
    if number == 1 then found.lease = value / 1000
    elseif number == 2 then found.renew = value / 1000
    elseif number == 3 then found.revision = value
    elseif number == 4 then found.seed = read_fixed(value)
    elseif number == 5 then found.candidates[#found.candidates + 1] = read_candidate(value)
    elseif number == 6 then found.retries = value
    elseif number == 7 then found.running_weight = read_double(value)
    elseif number == 8 then found.prefix_weight = read_double(value)
    elseif number == 9 then found.context = value
    elseif number == 10 then found.per_byte = read_double(value)
    elseif number == 11 then found.losses[#found.losses + 1] = read_loss(value)
    elseif number == 12 then found.sequence = value
    elseif number == 13 then found.forgets = value ~= 0
    else found.session_weight = read_double(value)
    end
  end)
  return found
end

-- A replica keeps its slot while it is a candidate; of one that is none any more nothing is remembered.
local function give_slots(model, candidates)
  local before, taken, slots, keep, has_changed = model.slots, {}, {}, -1, false
  for _, candidate in ipairs(candidates) do
    local slot = before[candidate.replica_id]
    if slot then slots[candidate.replica_id], taken[slot] = slot, true end
  end
  for replica_id, slot in pairs(before) do
    if not slots[replica_id] then keep, has_changed = band(keep, bnot(lshift(1, slot))), true end
  end
  lose_all(model, keep)
  local free = 0
  for _, candidate in ipairs(candidates) do
    local slot = slots[candidate.replica_id]
    if not slot then
      has_changed = true
      while taken[free] do free = free + 1 end
      slot, taken[free] = free, true
      slots[candidate.replica_id] = slot
    end
    candidate.bit = lshift(1, slot)
  end
  model.slots = slots
  if has_changed then model.ring = ring_of(candidates) end
end

local function take_losses(model, answer)
  if answer.forgets then forget(model) end
  local kept = -1
  for _, loss in ipairs(answer.losses) do
    local slot = model.slots[loss.replica_id]
    if slot then
      local keep = bnot(lshift(1, slot))
      if loss.blocks == "" then kept = band(kept, keep) end
      for at = 1, #loss.blocks, 8 do
        local key = tonumber(read_fixed(sub(loss.blocks, at, at + 7)))
        lose(model.known, key, keep)
        lose(model.older, key, keep)
      end
    end
  end
  lose_all(model, kept)
  model.sequence = answer.sequence
end

-- Takes over what the proxy says; `asked_at` is when it was asked.
local function take_answer(model, answer, asked_at)
  if answer.renew > 0 then model.renew_at = asked_at + answer.renew end
  if answer.lease == 0 or #answer.candidates == 0 or #answer.candidates > MAX_SLOTS then
    model.ends_at = 0
    return
  end
  if answer.revision ~= model.revision or answer.seed ~= model.seed then
    forget(model)
    model.secrets = make_secrets(answer.seed)
  end
  -- What was picked since it was asked the proxy has not counted.
  local recent = {}
  for _, candidate in ipairs(model.candidates) do
    recent[candidate.replica_id] = candidate.recent - (candidate.told or 0)
  end
  take_losses(model, answer)
  give_slots(model, answer.candidates)
  for _, candidate in ipairs(answer.candidates) do
    candidate.recent = recent[candidate.replica_id] or 0
    if candidate.room then candidate.room = candidate.room - candidate.recent end
  end
  model.candidates, model.revision, model.seed = answer.candidates, answer.revision, answer.seed
  model.retries, model.context, model.per_byte = answer.retries, answer.context, answer.per_byte
  model.running_weight, model.prefix_weight = answer.running_weight, answer.prefix_weight
  model.session_weight = answer.session_weight
  model.ends_at = asked_at + answer.lease
end

-- One request waits for it; those that come meanwhile go by what was said before, while that is valid.
local function renew(handle, model, now)
  local fails_at = now + RENEW_SECONDS
  model.asked_at, model.asking_until, model.renew_at = now, fails_at, fails_at
  local parts = {bytes_field(1, model.name), double_field(2, now), uint_field(3, model.sequence), uint_field(5, model.untold)}
  local message = table.concat(parts) .. table.concat(model.picks, "", 1, model.pick_count)
  -- Until they are known to be told.
  model.untold = model.untold + model.pick_count
  local untold = model.untold
  model.picks, model.pick_count, model.block_count = {}, 0, 0
  for _, candidate in ipairs(model.candidates) do candidate.told = candidate.recent end
  local size = #message
  local frame = char(0, rshift(size, 24), band(rshift(size, 16), 255), band(rshift(size, 8), 255), band(size, 255))
  local headers, answer = handle:httpCall(PICKER, {
    [":method"] = "POST", [":path"] = RENEW_PATH, [":authority"] = PICKER,
    ["content-type"] = "application/grpc", ["te"] = "trailers",
  }, frame .. message, RENEW_SECONDS * 1000)
  -- It came so late that another request asks by now.
  if model.asking_until ~= fails_at then return end
  model.asking_until = 0
  if not headers or headers[":status"] ~= "200" or not answer then return end
  model.untold = model.untold - untold
  local is_read, found = pcall(read_answer, answer)
  if is_read then take_answer(model, found, now) else handle:logErr("lane: an answer can't be read: " .. tostring(found)) end
end

-- The pick.

-- Whether a prompt and its answer may be too long for some candidate.
local function may_not_fit(model, size, lifted)
  if model.context == 0 then return false end
  local answer = 0
  for _, name in ipairs(BOUND_FIELDS) do
    local bound = lifted[name]
    if type(bound) == "number" and bound > answer then answer = bound end
  end
  return size * model.per_byte + answer + 1 >= model.context
end

-- How many of the blocks each candidate has, as `held`; whether any has any.
local function count_held(model, count)
  local candidates, having = model.candidates, -1
  for _, candidate in ipairs(candidates) do candidate.held = count end
  for number = 1, count do
    local still = band(having, holders(model, chain[number]))
    if still ~= having then
      local lost = bxor(having, still)
      for _, candidate in ipairs(candidates) do
        if band(lost, candidate.bit) ~= 0 then candidate.held = number - 1 end
      end
      if still == 0 then return number > 1 end
      having = still
    end
  end
  return count > 0
end

-- The best candidates with room, best first, of equal ones the first; none where all are full.
local function choose(model, count, is_drawn, home)
  local prefix, session = is_drawn and model.prefix_weight or 0, home and model.session_weight or 0
  local best, second, third
  for _, candidate in ipairs(model.candidates) do
    if not candidate.room or candidate.room > 0 then
      local load = candidate.running + candidate.recent
      local score = (1 - prefix - session) * (candidate.fixed + model.running_weight / (1 + load))
      if prefix > 0 then score = score + prefix * (candidate.held / count) end
      if candidate.replica_id == home then score = score + session end
      candidate.score = score
      if not best or score > best.score then
        best, second, third = candidate, best, second
      elseif not second or score > second.score then
        second, third = candidate, second
      elseif not third or score > third.score then
        third = candidate
      end
    end
  end
  return best, second, third
end

local function note(model, request_id, candidate, count, home, now)
  candidate.recent = candidate.recent + 1
  if candidate.room then candidate.room = candidate.room - 1 end
  if model.pick_count >= MAX_PICKS or model.block_count >= MAX_TOLD_BLOCKS then
    model.untold = model.untold + 1
    return
  end
  local pick = bytes_field(1, request_id) .. bytes_field(2, candidate.replica_id) .. double_field(3, now)
    .. double_field(4, candidate.score) .. uint_field(5, candidate.held)
  if count > 0 then pick = pick .. bytes_field(6, ffi.string(hashes, count * 8)) end
  if candidate.replica_id == home then pick = pick .. uint_field(7, 1) end
  model.pick_count = model.pick_count + 1
  model.picks[model.pick_count] = bytes_field(4, pick)
  model.block_count = model.block_count + count
  if model.pick_count >= MAX_PICKS or model.block_count >= MAX_TOLD_BLOCKS then model.renew_at = 0 end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local name = headers:get(LANE_HEADER)
  if not name then return end
  headers:remove(LANE_HEADER)
  local body = handle:body()
  local now = clock()
  local model = models[name] or new_model(name)
  if now >= model.renew_at and now >= model.asking_until then
    renew(handle, model, now)
    now = clock()
    body = handle:body()
  end
  if now >= model.ends_at then return end
  local text = body and body:getBytes(0, body:length()) or ""
  -- What Envoy lifted from the body.
  local lifted = handle:streamInfo():dynamicMetadata():get(METADATA_NAMESPACE) or {}
  if may_not_fit(model, #text, lifted) then return end
  -- What makes equal prompts different is a proxy's to read: a "cache_salt" (texts have fewer "_" than quotes).
  if find(text, '_salt"', 1, true) then return end
  headers = handle:headers()
  local count = model.prefix_weight > 0 and hash_prompt(model, find_prompt(text)) or 0
  local is_drawn = count_held(model, count)
  local session = model.session_weight > 0 and session_of(headers, lifted)
  local home = session and home_of(model.ring, session)
  local best, second, third = choose(model, count, is_drawn, home)
  if not best then return end
  local endpoints, retries = best.address, 0
  if second and model.retries >= 1 then endpoints, retries = endpoints .. "," .. second.address, 1 end
  if third and model.retries >= 2 then endpoints, retries = endpoints .. "," .. third.address, 2 end
  headers:replace(ENDPOINT_HEADER, endpoints)
  headers:replace(ROUTE_REVISION_HEADER, model.revision)
  headers:replace(MAX_RETRIES_HEADER, tostring(retries))
  if count >= COHORT_BLOCKS then headers:replace(COHORT_HEADER, string.format("%x", chain[COHORT_BLOCKS])) end
  note(model, headers:get(REQUEST_ID_HEADER) or "", best, count, home, now)
  learn(model, count, best.bit)
end
